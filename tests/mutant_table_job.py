"""Mutants of the life of processes: signals, agreements, handshakes; see `mutant_table.py`."""

SIGNALS, MEETING = "job/test_signals.py", "job/test_rendezvous.py"
EVALUATING = f"{SIGNALS}::test_a_signal_during_an_evaluation_saves_before_its_end_and_the_next_session_evaluates"
TWO_STOP = "job/test_preemption.py::test_two_processes_stop_at_the_same_step_one_later_at_most_when_one_gets_a_signal"
HOSTILE = f"{MEETING}::test_a_job_meets_among_hostile_and_silent_connections_which_are_logged_and_dropped"
SILENT = f"{MEETING}::test_a_silent_connection_is_dropped_in_time"
MESSAGE = f"{MEETING}::test_each_hostile_message_alone_is_dropped"
RECORDED = f"{MEETING}::test_a_recorded_handshake_and_one_with_another_secret_are_not_believed"
IMPOSTER = f"{MEETING}::test_an_imposter_at_the_port_of_process_0_is_not_believed"
LISTENS = "job/test_secret.py::test_process_0_listens_at_the_coordinators_address_alone_if_its_host_has_it"

TRAIN_ROWS = [
    (
        "a signal in an evaluation waits for its end",
        "evaluating, stopping = False, True",
        "evaluating, stopping = False, False",
        EVALUATING,
    ),
    (
        "an evaluation that was stopped is never made up for",
        "due = self.step > 0 and _due(settings.evaluate.every_steps, self.step, last=False)",
        "due = False",
        EVALUATING,
    ),
]
JOB_TABLE: dict[str, list[tuple[str, ...]]] = {
    "job/agreement.py": [
        (
            "all stop three steps late",
            "peer.send_all(encode(stop_at=most + 1, code=code))\n        self._settle(most + 1, code)",
            "peer.send_all(encode(stop_at=most + 4, code=code))\n        self._settle(most + 4, code)",
            TWO_STOP,
        ),
        (
            "nothing to save is no reason to end at once",
            "most == NEVER_BEGUN",
            "most < NEVER_BEGUN",
            f"{SIGNALS}::test_a_signal_at_any_moment_ends_a_job_fresh_or_resumed[2]",
        ),
    ],
    "job/signals.py": [
        (
            "an exception in an import",
            'frame.f_code.co_filename.startswith("<frozen importlib")',
            "False",
            f"{SIGNALS}::test_a_signal_during_an_import_ends_the_process",
        ),
    ],
    "job/launcher.py": [
        (
            "one secret for all starts, and none",
            'new_secret() if self.job.nodes == 1 else ""',
            '""',
            "job/test_launcher.py::test_each_start_on_one_host_has_a_secret_of_its_own_and_nodes_share_the_one_that_is_set",
        ),
    ],
    "job/handshake.py": [
        ("brackets within brackets", "(ValueError, RecursionError)", "ValueError", MESSAGE, "RecursionError"),
        (
            "any code is believed",
            'hmac.compare_digest(expected.encode(), code.encode("utf-8", "replace"))',
            "len(code) == len(expected)",
            RECORDED,
        ),
        (
            "a code that does not depend on the challenge",
            'f"{len(challenges)} {challenges} {text}"',
            'f"{text}"',
            RECORDED,
        ),
    ],
    "job/newcomers.py": [
        (
            "silent connections are kept for good",
            "newcomer.deadline < now",
            "False",
            SILENT,
            "TimeoutError",
        ),
        ("every dropped connection is logged", "if self._dropped <= _MOST_LOGGED:", "if True:", HOSTILE),
    ],
    "job/rendezvous.py": [
        (
            "process 0 is believed without a code",
            'return None if line is None else handshake.opened(secret, f"{theirs} {ours}", line)',
            'return None if line is None else handshake.parsed(handshake.parsed(line)["text"])',
            IMPOSTER,
            "TimeoutError",
        ),
    ],
    "job/listening.py": [
        (
            "a host's own name may mean its loopback",
            "(given_as_loopback or not _is_loopback(address))",
            "True",
            LISTENS,
        ),
    ],
    "job/secret.py": [
        (
            "a file that the group may read",
            "& 0o077",
            "& 0o007",
            "job/test_secret.py::test_a_file_that_others_may_read_is_refused",
        ),
    ],
}
