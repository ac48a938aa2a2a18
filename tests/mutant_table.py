"""The mutants of `mutants.py`: by file below `vit_dist/`, the slip in words, the text before and after, and the test.

The text before stands once in its file. The test, named below `tests/`, must fail by an assertion; where another
exception is the right way to fail, its name is last in the row. The test needs nothing that a bare checkout lacks,
for a test that is skipped kills nobody. Those of the model and its steps are in `mutant_table_step.py`,
those of checkpoints in `mutant_table_checkpoints.py`, those of published weights in `mutant_table_weights.py`, those of
jobs and signals in `mutant_table_job.py`, those of files of strangers in `mutant_table_files.py`.
"""

from mutant_table_checkpoints import BEST, CHECKPOINTS_TABLE
from mutant_table_files import FILES_TABLE
from mutant_table_job import JOB_TABLE, TRAIN_ROWS
from mutant_table_step import STEP_TABLE
from mutant_table_weights import WEIGHTS_TABLE

AXES = "mesh/test_layout.py::test_names_become_the_axes_that_the_mesh_has"
PREDICT = "step/test_evaluation.py::test_predict_gives_the_probabilities_of_the_loss_by_the_moving_average"
TOKENS = "test_features.py::test_class_token_mean_and_tokens_are_the_references_of_any_block"
KNN, LINEAR, OF_RUN = "probes/test_knn.py", "probes/test_linear.py", "probes/test_of_run.py"
MAPS = "model/test_attention_maps.py::test_maps_are_rows_of_the_last_weights_and_of_the_product_of_all"

TABLE: dict[str, list[tuple[str, ...]]] = {
    "data/pictures/augment.py": [
        (
            "flipped nine times in ten",
            "cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image",
            "cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.9 else image",
            "data/pictures/test_augment.py::test_one_image_in_two_is_flipped",
        ),
        (
            "one generator for all examples",
            "counter=position << 64",
            "counter=0",
            "data/pictures/test_augment.py::test_random_numbers_depend_on_seed_and_position_alone",
        ),
        (
            "erased unless drawn",
            "if rng.random() >= probability:",
            "if rng.random() < probability:",
            "data/pictures/test_augment.py::test_an_image_is_erased_with_the_given_probability",
        ),
        (
            "hue alone changes nothing",
            "if data.color_jitter or data.hue_jitter:",
            "if data.color_jitter:",
            "data/pictures/test_augment.py::test_each_augmentation_works_without_the_others",
        ),
        (
            "the device takes what it cannot do",
            'return data.augment_on != "host" and in_memory and not host_only',
            'return data.augment_on != "host" and in_memory',
            "data/pictures/test_augment.py::test_the_device_crops_and_flips_images_in_memory_that_need_no_augmentation_of_the_host",
        ),
    ],
    "data/pictures/crop.py": [
        (
            "aspect even, not in its logarithm",
            "ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))",
            "ratio = rng.uniform(*aspect)",
            "data/pictures/test_crop.py::test_crops_are_those_of_earlier_versions",
        ),
        (
            "the largest box of any aspect",
            "ratio = min(max(width / height, aspect[0]), aspect[1])",
            "ratio = width / height",
            "data/pictures/test_crop.py::test_where_no_box_fits_the_largest_centred_one_is_taken",
        ),
    ],
    "data/sets/examples.py": [
        (
            "classes of one name are one",
            "        if counts[name] > 1:",
            "        if False:",
            "data/sets/test_examples.py::test_classes_of_one_name_are_shown_with_their_numbers",
        ),
    ],
    "data/sets/index.py": [
        (
            "a test split's classes of one name are matched",
            "        check_distinct(self.class_names, where)\n",
            "",
            "data/sets/test_examples.py::test_splits_whose_classes_have_one_name_twice_are_not_matched_by_it",
        ),
    ],
    "data/stream/order.py": [
        (
            "repeats forgotten",
            "positions = np.asarray(positions, np.int64) // self.repeats",
            "positions = np.asarray(positions, np.int64)",
            "data/stream/test_order.py::test_an_example_is_repeated_at_as_many_positions_in_a_row",
        ),
        (
            "all sources of a mixture in one order",
            "shuffled(self.seed, (_SOURCE, number), epochs, size, offsets)",
            "shuffled(self.seed, (_SOURCE,), epochs, size, offsets)",
            "data/stream/test_order.py::test_the_order_of_a_mixture_is_that_of_the_first_release",
        ),
    ],
    "data/shuffle.py": [
        (
            "every epoch in one order",
            "return shuffled(seed, (), epochs, size, offsets)",
            "return shuffled(seed, (), 0 * epochs, size, offsets)",
            "data/stream/test_order.py::test_the_order_is_that_of_the_first_release",
        ),
        (
            "the seed changes no order",
            "np.random.SeedSequence((seed, epoch), spawn_key=spawn_key)",
            "np.random.SeedSequence((0, epoch), spawn_key=spawn_key)",
            "data/stream/test_order.py::test_epochs_and_seeds_have_unrelated_orders",
        ),
    ],
    "data/stream/workers.py": [
        (
            "a parent that has ended already is not noticed",
            "if wait([parent.sentinel], timeout=0):",
            "if False:",
            "data/stream/test_workers.py::test_a_worker_whose_parent_has_ended_before_it_asks_for_a_signal_ends_too",
        ),
    ],
    "evaluate.py": [
        (
            "top-1 is top-5",
            'top1=int(sums["top1"]) / max(count, 1)',
            'top1=int(sums["top5"]) / max(count, 1)',
            "test_evaluate.py::test_accuracies_by_class_add_up_to_the_whole",
        ),
        (
            "accuracies of classes with one name are merged",
            "zip(distinct_names(source.class_names), ",
            "zip(source.class_names, ",
            "test_evaluate.py::test_classes_of_one_name_have_an_accuracy_each",
        ),
        (
            "missing examples are not noticed",
            "if count + len(bad) != len(source):",
            "if False:",
            "test_evaluate.py::test_an_evaluation_that_misses_an_example_is_an_error",
        ),
    ],
    "extraction.py": [
        ("the block before", "else self.block + 1", "else max(self.block, 1)", TOKENS),
        ("tokens without the last norm", "x if model.norm is None else model.norm(x)", "x", TOKENS),
        (
            "labels of the first batch for all",
            "source.labels[ids]",
            "source.labels[ids - first]",
            "test_features.py::test_every_example_is_there_once_on_any_mesh_whatever_the_batch",
        ),
    ],
    "features.py": [
        (
            "parts of any features are continued",
            "if old.get(key) != plan.get(key)",
            'if key == "weights" and old.get(key) != plan.get(key)',
            "test_features.py::test_parts_of_another_extraction_are_not_continued",
        ),
        (
            "too many bad files are forgotten after a stop",
            "skipped > max_bad_fraction * len(source) or not count",
            "not count",
            "test_features.py::test_a_file_that_does_not_decode_is_an_error_or_left_out_as_data_on_bad_says",
        ),
    ],
    "load.py": [
        (
            "predict names two classes alike",
            "distinct_names(published.description.classes or ())",
            "published.description.classes or ()",
            "test_predict.py::test_classes_of_one_name_are_told_apart",
        ),
    ],
    "mesh/layout.py": [
        ("fsdp splits no batch", '"batch": ("dcn_data", "data", "fsdp"),', '"batch": ("dcn_data", "data"),', AXES),
        ("parameters whole everywhere", '"width": ("fsdp",),', '"width": (),', AXES),
        (
            "summed over data in each micro-batch",
            "reduced = frozenset(batch_axes()).difference(split_axes(parameter))",
            "reduced = frozenset[str]()",
            "mesh/test_collectives.py::test_nothing_crosses_data_inside_the_loop_over_micro_batches",
        ),
        (
            "every product's gradient summed over tensor",
            "unreduced=frozenset(_as_tuple(columns)))",
            "unreduced=frozenset())",
            "model/test_product.py::test_the_gradients_of_products_on_a_mesh_are_summed_over_tensor_once",
        ),
        (
            "gradients not summed over tokens",
            'used.intersection(TABLE["batch"] + TABLE["tokens"])',
            'used.intersection(TABLE["batch"])',
            "model/test_context.py::test_a_model_with_split_tokens_agrees_with_one_device",
            "ShardingTypeError",  # of jax, which knows from the types that a sum is missing
        ),
        (
            "any size divides",
            "    if size % divisor:\n",
            "    if False:\n",
            "mesh/test_layout.py::test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_do",
        ),
    ],
    "model/attention_maps.py": [
        ("rollout without the residual path", "(last + jnp.eye(model.shape.tokens)) / 2", "last", MAPS),
        ("rollout from the last block", '"bqk,bkn->bqn", step, rollout', '"bqk,bkn->bqn", rollout, step', MAPS),
        (
            "weights of inputs without their norm",
            "block.norm1.normalise(x), block.norm1",
            "x, block.norm1",
            "model/test_attention_maps.py::test_weights_are_the_softmax_of_the_references_scores",
        ),
    ],
    "plan/overlap.py": [
        (
            "a transfer ends with anybody's answer",
            "and rendezvous(computation[instruction.operands[0]]) == rendezvous(send)",
            "",
            "plan/test_overlap.py::test_a_transfer_between_slices_lasts_until_its_answer_is_received",
        ),
    ],
    "predict.py": [
        (
            "predict's sigmoid as softmax",
            'jax.nn.sigmoid(logits) if settings.loss == "sigmoid" else jax.nn.softmax(logits)',
            "jax.nn.softmax(logits)",
            PREDICT,
        ),
    ],
    "rates.py": [
        (
            "a moment is judged",
            "MIN_CHECK_S = 10.0",
            "MIN_CHECK_S = 0.0",
            "test_rates.py::test_a_stretch_is_judged_with_those_before_it_once_they_are_ten_seconds",
        ),
    ],
    "probes/knn.py": [
        (
            "features are not moved by their mean",
            "sum(chosen(features[block]).sum(0) for block in blocks) / len(features)",
            "np.zeros(features.shape[1])",
            f"{KNN}::test_features_that_are_nearly_alike_are_told_apart",
        ),
        (
            "every block of features numbered from 0",
            "which + first",
            "which",
            f"{KNN}::test_features_and_queries_that_fill_no_block_and_several_are_searched_whole",
        ),
        (
            "of equally near features the last",
            "np.lexsort((candidates, -similarity))",
            "np.lexsort((-candidates, -similarity))",
            f"{KNN}::test_of_equal_votes_the_lowest_class_wins_and_of_equal_neighbours_the_first",
        ),
        (
            "votes that fall with the similarity",
            "(similarity - similarity[:, :1]) / temperature",
            "(similarity[:, :1] - similarity) / temperature",
            f"{KNN}::test_classes_are_those_of_scikit_learn_by_even_votes_and_by_dinos",
        ),
        (
            "the length of a vector of zeros divided by",
            "np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), _TINY)",
            "np.linalg.norm(rows, axis=-1, keepdims=True)",
            f"{KNN}::test_a_vector_of_zeros_is_at_right_angles_to_all",
        ),
    ],
    "probes/linear.py": [
        (
            "the penalty grows with the number of examples",
            "squares += x.T @ x / n",
            "squares += x.T @ x",
            f"{LINEAR}::test_classes_are_those_of_scikit_learn_at_every_strength",
        ),
        (
            "the strength is chosen by what has been learnt",
            "predictions(features[~out], labels[~out], features[out], l2)",
            "predictions(features, labels, features[out], l2)",
            f"{LINEAR}::test_the_strength_is_the_best_of_a_cross_validation_by_scikit_learn",
        ),
        (
            "classes without an example are numbered away",
            "each[rows] = known[(x @ weight + offset).argmax(1)]",
            "each[rows] = (x @ weight + offset).argmax(1)",
            f"{LINEAR}::test_two_classes_do_and_those_without_an_example_are_never_predicted",
        ),
        (
            "of equally good strengths the least",
            "max(zip(right.tolist(), l2, strict=True))[1]",
            "-max(zip(right.tolist(), [-each for each in l2], strict=True))[1]",
            f"{LINEAR}::test_of_equally_good_strengths_the_greatest_is_taken_whatever_their_order",
        ),
    ],
    "probes/measure.py": [
        (
            "an example that was skipped is listed by its place among the shots",
            "int(self.ids[example.id])",
            "example.id",
            "probes/test_of_run.py::test_a_file_that_a_probe_skips_is_listed_once_by_its_id",
        ),
        (
            "features that are not finite are measured",
            "        if wrong:",
            "        if wrong > len(features):",
            "test_probe.py::test_features_that_are_not_finite_are_refused",
        ),
        (
            "the strength is chosen by the test split",
            "shares[settings.l2.index(best)]",
            "max(shares)",
            f"{OF_RUN}::test_every_evaluation_has_a_row_of_each_probe_after_those_of_its_splits",
        ),
        (
            "training examples find themselves",
            'if split != "train":',
            "if split:",
            f"{OF_RUN}::test_the_training_split_is_not_classified_by_itself",
        ),
        (
            "few shots need all features",
            'if set(names) == {"few_shot"}:',
            "if not names:",
            f"{OF_RUN}::test_a_few_shot_probe_alone_reads_the_images_of_its_shots_alone",
        ),
    ],
    "probes/shots.py": [
        (
            "one shuffle for all classes",
            "(_KEY, int(label))",
            "(_KEY,)",
            "probes/test_shots.py::test_classes_of_one_size_have_choices_of_their_own",
        ),
    ],
    "run/workdir.py": [
        (
            "a resumed run's blocks stacked or not as this platform likes",
            'saved.model.scan if wanted.model.scan == "auto"',
            'wanted.model.scan if wanted.model.scan == "auto"',
            "test_resume.py::test_a_run_that_leaves_scan_to_the_program_keeps_what_it_began_with",
            "ConfigError",  # the saved config has blocks in a loop, and the new one has not
        ),
    ],
    "train.py": [
        (
            "features of the parameters though there is an average",
            "averaged = self.state.parameters if self.state.ema is None else self.state.ema",
            "averaged = self.state.parameters",
            f"{OF_RUN}::test_the_rows_are_of_the_average_and_the_verb_finds_the_same",
        ),
        (
            "a run that another process has finished meanwhile is overwritten",
            "run_files.check_unchanged(workdir, seen)",
            "seen.clear()",
            "test_one_owner.py::test_a_workdir_that_another_has_finished_meanwhile_is_not_overwritten",
        ),
        (
            "a best between two saves is lost",
            "if saving or stopping or (evaluating and self._is_one_of_the_best()):",
            "if saving or stopping:",
            BEST,
        ),
        *TRAIN_ROWS,
    ],
    **CHECKPOINTS_TABLE,
    **FILES_TABLE,
    **JOB_TABLE,
    **STEP_TABLE,
    **WEIGHTS_TABLE,
}
