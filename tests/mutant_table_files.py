"""Mutants of what is read from files of strangers and written to terminals, and of locks; see `mutant_table.py`."""

LOCK, FILES, ESCAPE, NPY = "run/test_lock.py", "run/test_files.py", "test_escape.py", "data/test_npy.py"
SHAPES = f"{FILES}::test_a_file_of_another_shape_is_refused_by_the_key_that_is_wrong"
NAMES = "test_hostile_names.py"
RACE = f"{LOCK}::test_of_many_that_race_for_a_dead_owners_lock_one_gets_it"

FILES_TABLE: dict[str, list[tuple[str, ...]]] = {
    "run/lock.py": [
        (
            "a process of the same number is taken for the owner",
            'in (self.values["began"], _HIDDEN)',
            '!= ""',
            f"{LOCK}::test_a_process_that_has_the_number_of_the_dead_owner_is_not_taken_for_it",
            "ConfigError",
        ),
        (
            "an owner on another host is dead at once",
            "elif _age(each) <= deadline:",
            "elif _age(each) <= 0:",
            f"{LOCK}::test_an_owner_out_of_sight_whose_file_is_touched_lives",
        ),
        (
            "an owner on another host lives long after its deadline",
            "elif _age(each) <= deadline:",
            "elif _age(each) <= 5 * deadline:",
            f"{LOCK}::test_an_owner_out_of_sight_is_awaited_until_the_deadline",
        ),
        ("two make one lock", "os.O_CREAT | os.O_EXCL | os.O_WRONLY", "os.O_CREAT | os.O_WRONLY", RACE),
        (
            "no second look after the lock is made",
            "if {each.file for each in _holders(self._folder)} - {file} <= set(dead):",
            "if True:",
            f"{LOCK}::test_two_that_have_found_different_locks_both_begin_again",
        ),
        (
            "an owner does not touch its file",
            "os.utime(self._file)",
            "self._file.stat()",
            f"{LOCK}::test_the_owner_touches_its_file_and_notices_when_it_is_taken_away",
        ),
        (
            "a lock that was lost is removed though it is another's",
            "if self._holds():\n            self._file.unlink(missing_ok=True)",
            "for each in _holders(self._folder):\n            each.file.unlink()",
            f"{LOCK}::test_the_owner_touches_its_file_and_notices_when_it_is_taken_away",
        ),
        (
            "what killed writers left stays",
            "remove_partial(each)",
            "list(each.iterdir())",
            f"{LOCK}::test_what_killed_writers_left_is_removed_and_nothing_else",
        ),
    ],
    "run/files.py": [
        ("true is a whole number", "type(value) is int and", "isinstance(value, int) and", SHAPES),
        ("infinity is a number", "and abs(value) <= sys.float_info.max", "", SHAPES),
        (
            "only the first of a list is looked at",
            "for number, item in enumerate(value)]",
            "for number, item in enumerate(value[:1])]",
            SHAPES,
        ),
        (
            "brackets are followed to the end of the stack",
            "except (ValueError, RecursionError) as error:",
            "except ValueError as error:",
            f"{FILES}::test_a_damaged_file_is_refused_by_name",
            "RecursionError",
        ),
        (
            "a cut line of a file that is written whole is ignored",
            "if last and not cut:",
            "if not cut and not last:",
            f"{FILES}::test_only_the_last_line_of_a_file_that_is_added_to_may_be_cut",
        ),
    ],
    "escape.py": [
        ("C1 is left", "\\x7f-\\x9f", "\\x7f", f"{ESCAPE}::test_what_a_terminal_obeys_is_written_as_an_escape"),
        (
            "text may turn around",
            "\\u202a-\\u202e\\u2066-\\u2069",
            "",
            f"{ESCAPE}::test_what_a_terminal_obeys_is_written_as_an_escape",
        ),
        (
            "values of log records begin lines",
            'return value if hasattr(value, "__float__") else printable(str(value))',
            "return value",
            f"{ESCAPE}::test_log_records_are_escaped_and_numbers_in_them_formatted",
        ),
        (
            "lines of a message begin like others",
            'return "\\n    ".join',
            'return "\\n".join',
            f"{ESCAPE}::test_a_message_of_several_lines_has_none_that_looks_like_its_own",
        ),
    ],
    "data/npy.py": [
        (
            "headers are believed",
            "if claimed != found and not dtype.hasobject:",
            "if claimed < found and not dtype.hasobject:",
            f"{NPY}::test_an_array_that_is_not_what_its_header_says_is_refused",
            "_ArrayMemoryError",
        ),
    ],
    "paths.py": [
        (
            "an address is a folder",
            'slashes = "/" if isinstance(path, str) else ""',
            'slashes = "///"',
            "test_errors.py::test_an_address_is_refused_where_a_function_expects_a_path",
        ),
    ],
    "data/sets/sources.py": [
        (
            "names of classes stay bytes",
            "class_names=tuple(map(printable, source.class_names))",
            "class_names=source.class_names",
            f"{NAMES}::test_a_run_on_them_keeps_names_that_can_be_written_and_printed",
        ),
    ],
    "data/pictures/images.py": [
        (
            "Pillow opens what it likes",
            "Image.open(io.BytesIO(data), formats=_FORMATS)",
            "Image.open(io.BytesIO(data))",
            "data/pictures/test_images.py::test_no_file_reaches_a_program_that_runs_what_is_in_it",
        ),
    ],
}
