"""Mutants of checkpoints: how they are saved, and how damage to them is told; see `mutant_table.py`."""

KEPT = "run/test_checkpoints.py::test_the_newest_and_the_best_are_kept"
BEST = "test_loop.py::test_the_best_is_saved_when_it_is_measured_however_seldom_checkpoints_are"
ANY_MESH = "mesh/test_digests.py::test_every_device_of_any_mesh_says_what_numpy_says"
DAMAGE = "run/test_damage.py::test_every_fault_of_a_sample_of_files_is_told_and_the_step_before_is_used"
BIT = "run/test_damage.py::test_a_bit_of_a_tensor_is_noticed_and_the_tensor_named[False]"
DELETED = "run/test_damage.py::test_a_reader_whose_step_is_deleted_meanwhile_reads_the_newest_that_there_is_then"
GOES_ON = "run/test_checkpoints.py::test_a_run_goes_on_after_a_save_that_failed_and_keeps_what_there_is"

CHECKPOINTS_TABLE: dict[str, list[tuple[str, ...]]] = {
    "mesh/digests.py": [
        (
            "an element's place does not count",
            "mixed = words ^ key",
            "mixed = words ^ (key & np.uint32(0))",
            "mesh/test_digests.py::test_both_halves_of_a_digest_depend_on_every_element",
        ),
        (
            "copies are added up",
            "jax.lax.psum(jnp.stack([sums[number] for number in numbers]), split)",
            "jax.lax.psum(jnp.stack([sums[number] for number in numbers]), axes)",
            ANY_MESH,
        ),
        (
            "the second axis of two that split a dimension is forgotten",
            "place = place * np.uint32(mesh.shape[axis]) + jax.lax",
            "place = jax.lax",
            ANY_MESH,
        ),
    ],
    "run/checkpoints.py": [
        ("the newest alone is kept", "policies.LatestN(self._keep_last)", "policies.LatestN(1)", KEPT),
        ("no best is kept", "n=self._keep_best, keep", "n=0, keep", KEPT),
        (
            "the worst is the best",
            "return max(measured)[1] if measured else None",
            "return min(measured)[1] if measured else None",
            KEPT,
        ),
        (
            "a NaN is the best",
            "return -math.inf if math.isnan(value) else value",
            "return math.inf if math.isnan(value) else value",
            KEPT,
        ),
        ("one more than the best is saved", "len(as_good) < self._keep_best", "len(as_good) <= self._keep_best", BEST),
        (
            "digests are read and not compared",
            "_agreed(folder, lambda: whole.compare(folder, record, found.each()))",
            "found.each()",
            BIT,
        ),
        (
            "a step that was deleted meanwhile is called damaged",
            "if not processes.gather(self._deleted(chosen, step, error))[0]:",
            "if processes.gather(True)[0]:",
            DELETED,
            "ConfigError",
        ),
        (
            "a step that was not saved is counted",
            "self._checkpointer.reload()  # it counts",
            "pass  # it counts",
            GOES_ON,
        ),
    ],
    "run/falling_back.py": [
        (
            "a damaged step stays where it is",
            "for number, problem in damaged.items():\n                name",
            "for number, problem in list[tuple[int, Damaged]]():\n                name",
            "run/test_damage.py::test_two_damaged_steps_are_set_aside_beside_those_of_an_earlier_time",
        ),
    ],
    "run/save_failures.py": [
        (
            "a run never ends, however many saves fail",
            "if self._count >= self._retries:",
            "if self._count > 9:",
            "run/test_checkpoints.py::test_a_run_ends_after_so_many_saves_in_a_row_that_failed",
        ),
        (
            "failures are not in a row",
            "            self._count = 0\n",
            "",
            "run/test_checkpoints.py::test_failures_count_in_a_row",
            "ConfigError",
        ),
    ],
    "run/step_record.py": [
        ("files are as long as they were, and no more is asked", "if found != expected:", "if False:", DAMAGE),
    ],
    "run/whole.py": [
        (
            "a tensor that nobody asked for is overlooked",
            "return missing + other + extra",
            "return missing + other",
            "run/test_checkpoints.py::test_a_tensor_that_does_not_fit_is_named",
        ),
        ("any digest will do", "if record.tensors[path] != found:", "if False:", BIT),
    ],
    "checkpoint_list.py": [
        (
            "a save under way is removed",
            'if prune and state != "being saved":',
            "if prune:",
            "test_damaged_runs.py::test_checkpoints_are_listed_verified_and_pruned",
        ),
    ],
}
