"""The mutants of `mutants.py`: by file below `vit_dist/`, the slip in words, the text before and after, and the test.

The text before stands once in its file. The test, named below `tests/`, must fail. It needs nothing that a bare
checkout lacks, for a test that is skipped kills nobody.
"""

_UPDATE, _EVALUATION = "step/test_update.py", "step/test_evaluation.py"
_FOUR_STEPS = f"{_UPDATE}::test_four_steps_are_those_of_the_reference"
SOFTMAX = f"{_FOUR_STEPS}[softmax on one device]"
SIGMOID = f"{_FOUR_STEPS}[sigmoid in 2 micro-batches on one device]"
SIGMOID_ON_4 = f"{_FOUR_STEPS}[sigmoid in 4 micro-batches on data=2 x fsdp=2]"
DRAWS = f"{_UPDATE}::test_no_two_steps_micro_batches_blocks_or_examples_share_a_random_number"
FRESH = f"{_UPDATE}::test_a_fresh_state_follows_the_seed_and_its_average_begins_as_the_parameters"
SEED = f"{_UPDATE}::test_the_seed_and_the_step_alone_decide_how_a_batch_is_mixed"
EVALUATION = f"{_EVALUATION}::test_an_evaluation_adds_up_loss_and_right_answers_of_the_rows_that_count"
WHOLE_IMAGES = f"{_EVALUATION}::test_whole_images_are_cut_to_their_centre_and_resized_on_the_device"
PREDICT = f"{_EVALUATION}::test_predict_gives_the_probabilities_of_the_loss_by_the_moving_average"
VIT = "model/test_vit.py::test_logits_and_gradients_are_those_of_the_papers_model"

TABLE: dict[str, list[tuple[str, str, str, str]]] = {
    "data/augment.py": [
        (
            "flipped nine times in ten",
            "cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image",
            "cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.9 else image",
            "data/test_augment.py::test_one_image_in_two_is_flipped",
        ),
        (
            "one generator for all examples",
            "counter=position << 64",
            "counter=0",
            "data/test_augment.py::test_random_numbers_depend_on_seed_and_position_alone",
        ),
        (
            "erased unless drawn",
            "if rng.random() >= probability:",
            "if rng.random() < probability:",
            "data/test_augment.py::test_erasing_happens_as_often_as_asked",
        ),
        (
            "hue alone changes nothing",
            "if data.color_jitter or data.hue_jitter:",
            "if data.color_jitter:",
            "data/test_augment.py::test_each_kind_of_change_is_made_when_it_alone_is_asked_for",
        ),
        (
            "the device takes what it cannot do",
            'return data.augment_on != "host" and in_memory and not host_alone',
            'return data.augment_on != "host" and in_memory',
            "data/test_augment.py::test_the_device_crops_and_flips_images_in_memory_unless_the_host_alone_can_do_what_is_asked",
        ),
    ],
    "data/crop.py": [
        (
            "aspect even, not in its logarithm",
            "ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))",
            "ratio = rng.uniform(*aspect)",
            "data/test_crop.py::test_a_box_drawn_is_the_same_as_ever",
        ),
        (
            "the largest box of any aspect",
            "ratio = min(max(width / height, aspect[0]), aspect[1])",
            "ratio = width / height",
            "data/test_crop.py::test_where_no_box_fits_the_largest_centred_one_is_taken",
        ),
    ],
    "data/order.py": [
        (
            "every epoch in one order",
            "return _shuffled(seed, (), epochs, size, ranks)",
            "return _shuffled(seed, (), 0 * epochs, size, ranks)",
            "data/test_order.py::test_the_order_is_that_of_the_first_release",
        ),
        (
            "the seed changes no order",
            "np.random.SeedSequence((seed, epoch), spawn_key=what)",
            "np.random.SeedSequence((0, epoch), spawn_key=what)",
            "data/test_order.py::test_epochs_and_seeds_have_unrelated_orders",
        ),
        (
            "repeats forgotten",
            "places = np.asarray(positions, np.int64) // self.repeats",
            "places = np.asarray(positions, np.int64)",
            "data/test_order.py::test_repeats_give_each_place_of_the_stream_so_many_positions",
        ),
        (
            "all parts of a mixture in one order",
            "_shuffled(self.seed, (_PART, number), epochs, size, ranks)",
            "_shuffled(self.seed, (_PART,), epochs, size, ranks)",
            "data/test_order.py::test_the_order_of_a_mixture_is_that_of_the_first_release",
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
            "missing examples are not noticed",
            "if count + len(bad) != len(source):",
            "if False:",
            "test_evaluate.py::test_an_evaluation_that_misses_an_example_is_an_error",
        ),
    ],
    "mesh/layout.py": [
        (
            "fsdp splits no batch",
            '"batch": ("dcn_data", "data", "fsdp"),',
            '"batch": ("dcn_data", "data"),',
            "mesh/test_layout.py::test_names_become_the_axes_that_the_mesh_has",
        ),
        (
            "parameters whole everywhere",
            '"width": ("fsdp",),',
            '"width": (),',
            "mesh/test_layout.py::test_names_become_the_axes_that_the_mesh_has",
        ),
        (
            "summed over data in each micro-batch",
            'reduced = frozenset(batch_axes()) - frozenset(TABLE["width"])',
            "reduced = frozenset[str]()",
            "mesh/test_collectives.py::test_nothing_crosses_data_inside_the_loop_over_micro_batches",
        ),
        (
            "gradients not summed over tokens",
            'met.intersection(TABLE["batch"] + TABLE["tokens"])',
            'met.intersection(TABLE["batch"])',
            "model/test_context.py::test_a_model_with_split_tokens_is_that_of_one_device",
        ),
        (
            "any size divides",
            "    if size % parts:\n",
            "    if False:\n",
            "mesh/test_layout.py::test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_do",
        ),
    ],
    "model/attention.py": [
        ("scores by the whole width", "q * q.shape[-1] ** -0.5", "q * (q.shape[-2] * q.shape[-1]) ** -0.5", SOFTMAX),
        (
            "keys and values swapped",
            "q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]",
            "q, v, k = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]",
            SOFTMAX,
        ),
        ("attention weights never dropped", ".astype(v.dtype), rate, key)", ".astype(v.dtype), 0.0, key)", DRAWS),
    ],
    "model/layers.py": [
        (
            "LayerNorm's eps 1e-5",
            "epsilon: float = 1e-6",
            "epsilon: float = 1e-5",
            "model/test_layers.py::test_layer_norm_adds_a_millionth_to_the_variance",
        ),
        (
            "dropout not scaled",
            "jnp.where(keep, x / (1 - rate),",
            "jnp.where(keep, x,",
            "model/test_layers.py::test_dropout_zeroes_at_its_rate_and_keeps_the_mean",
        ),
        (
            "drop-path not scaled",
            "((draws >= rate) / (1 - rate))",
            "(draws >= rate)",
            "model/test_layers.py::test_drop_path_drops_whole_examples_at_its_rate_and_scales_the_rest_up",
        ),
        ("gelu's forms swapped", 'self.activation == "gelu_tanh"', 'self.activation != "gelu_tanh"', SOFTMAX),
        (
            "examples share a mask",
            "shape = (x.shape[1], x.shape[0], *x.shape[2:])\n",
            "shape = (x.shape[1], 1, *x.shape[2:])\n",
            DRAWS,
        ),
    ],
    "model/vit.py": [
        (
            "attention without its norm",
            "attended = self.attention(h, keys[0])",
            "attended = self.attention(x, keys[0])",
            SOFTMAX,
        ),
        (
            "no residual around attention",
            'checkpoint_name(x + attended, "residual")',
            'checkpoint_name(attended, "residual")',
            SOFTMAX,
        ),
        ("MLP and attention share a key", "self.mlp(h, keys[2])", "self.mlp(h, keys[0])", DRAWS),
        (
            "blocks share a key",
            "jax.random.split(key, depth)",
            "jax.random.split(key, 1)[jnp.zeros(depth, int)]",
            DRAWS,
        ),
        ("registers are pooled", "else (self.shape.special, self.shape.tokens)", "else (0, self.shape.tokens)", VIT),
        ("class token without a position", "cls + position[:1] if own else cls", "cls", SOFTMAX),
        (
            "LayerScale forgotten",
            "drop_path(self.scale2(y) if self.scale2 is not None else y, path_rate",
            "drop_path(y, path_rate",
            SIGMOID,
        ),
        (
            "drop-path not linear",
            'first = 0 if self.model.drop_path_schedule == "linear" else self.model.drop_path',
            "first = self.model.drop_path",
            "model/test_vit.py::test_drop_path_follows_its_schedule_and_every_branch_of_every_block_draws_for_itself",
        ),
        (
            "head's bias wrong at the start",
            "bias=model.head_bias",
            "bias=0.0",
            "model/test_vit.py::test_a_fresh_model_starts_as_the_papers_do",
        ),
    ],
    "predict.py": [
        (
            "predict's sigmoid as softmax",
            'jax.nn.sigmoid(logits) if settings.loss == "sigmoid" else jax.nn.softmax(logits)',
            "jax.nn.softmax(logits)",
            PREDICT,
        ),
        (
            "predict by the plain parameters",
            'parameters.get("ema", parameters["parameters"])',
            'parameters["parameters"]',
            PREDICT,
        ),
    ],
    "run/checkpoints.py": [
        (
            "the newest alone is kept",
            "policies.LatestN(keep_last)",
            "policies.LatestN(1)",
            "run/test_checkpoints.py::test_the_newest_and_the_best_are_kept",
        ),
        (
            "no best is kept",
            "n=keep_best, keep",
            "n=0, keep",
            "run/test_checkpoints.py::test_the_newest_and_the_best_are_kept",
        ),
        (
            "the worst is the best",
            "return max(measured)[1] if measured else None",
            "return min(measured)[1] if measured else None",
            "run/test_checkpoints.py::test_the_newest_and_the_best_are_kept",
        ),
        (
            "a NaN is the best",
            "return -math.inf if math.isnan(value) else value",
            "return math.inf if math.isnan(value) else value",
            "run/test_checkpoints.py::test_the_newest_and_the_best_are_kept",
        ),
        (
            "a tensor that nobody asked for is overlooked",
            "return missing + other + extra",
            "return missing + other",
            "run/test_checkpoints.py::test_a_tensor_that_does_not_fit_is_named",
        ),
        (
            "one more than the best is saved",
            "len(as_good) < self._keep_best",
            "len(as_good) <= self._keep_best",
            "test_loop.py::test_the_best_is_saved_when_it_is_measured_however_seldom_checkpoints_are",
        ),
    ],
    "step/augment.py": [
        ("targets not mixed", "targets * share + targets[::-1] * (1 - share)", "targets", SOFTMAX),
        ("cutmix keeps the drawn share", "share = jnp.where(cut, weights.mean(), share)", "share = share", SIGMOID),
        (
            "a box that does not fit is taken",
            "fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)",
            "fits = (widths > 0) & (heights > 0)",
            "data/test_crop.py::test_the_device_draws_boxes_by_the_law_of_the_host",
        ),
    ],
    "step/losses.py": [
        ("sigmoid's mean over classes", "each.sum(axis=-1)", "each.mean(axis=-1)", SIGMOID),
    ],
    "step/optimizer.py": [
        (
            "clip after the direction",
            "    parts = [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]\n"
            "    parts.append(DIRECTIONS[name](settings))",
            "    parts = [DIRECTIONS[name](settings)]\n"
            "    parts += [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]",
            SOFTMAX,
        ),
        ("no clip", "[optax.clip_by_global_norm(settings.clip)]", "[]", SOFTMAX),
        ("clip element by element", "optax.clip_by_global_norm(settings.clip)", "optax.clip(settings.clip)", SOFTMAX),
        ("decay on biases", "float(is_kernel(path))", "1.0", SOFTMAX),
        (
            "b1 and b2 swapped",
            "settings.b1, settings.b2, settings.eps, mu",
            "settings.b2, settings.b1, settings.eps, mu",
            SOFTMAX,
        ),
        ("rates of rules ignored", "optax.masked(optax.scale(factor), where)", "optax.identity()", SIGMOID),
        (
            "schedule ignored by the optimizer",
            "scale_by_learning_rate(make_schedule(settings, total_steps))",
            "scale_by_learning_rate(settings.learning_rate)",
            SOFTMAX,
        ),
    ],
    "step/schedule.py": [
        (
            "warm-up from zero",
            "optax.linear_schedule(peak / warmup, peak, warmup - 1)",
            "optax.linear_schedule(0.0, peak, warmup)",
            SOFTMAX,
        ),
    ],
    "step/state.py": [],
    "step/update.py": [
        (
            "smoothing dropped",
            "targets = losses.smooth(targets, settings.label_smoothing)",
            "targets = losses.smooth(targets, 0.0)",
            SOFTMAX,
        ),
        ("targets not binarised", "if settings.binarize_targets:", "if False:", SIGMOID_ON_4),
        (
            "smoothing before binarising",
            "            targets = losses.binarize(targets)\n"
            "        targets = losses.smooth(targets, settings.label_smoothing)",
            "            targets = losses.binarize(losses.smooth(targets, settings.label_smoothing))",
            SIGMOID_ON_4,
        ),
        ("EMA's warm-up gone", "d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))", "d = decay", SOFTMAX),
        (
            "grad_norm of the updates",
            '"grad_norm": optax.tree.norm(gradients)',
            '"grad_norm": optax.tree.norm(updates)',
            SOFTMAX,
        ),
        (
            "one key for all micro-batches",
            "(micro, jax.random.split(key, count))",
            "(micro, jax.random.split(key, 1)[jnp.zeros(count, int)])",
            DRAWS,
        ),
        (
            "key not folded with the step",
            "jax.random.fold_in(jax.random.key(settings.seed), state.step)",
            "jax.random.key(settings.seed)",
            DRAWS,
        ),
        ("seed ignored by the step", "jax.random.key(settings.seed)", "jax.random.key(0)", SEED),
        (
            "eval_crop ignored on the device",
            "if crop_on_device and data.eval_crop is not None:",
            "if False:",
            WHOLE_IMAGES,
        ),
        ("micro-batches' means summed", "jnp.sum(each) / settings.batch_size", "jnp.mean(each)", SIGMOID),
        (
            "EMA of the old parameters",
            "average(state.ema, parameters,",
            "average(state.ema, state.parameters,",
            SOFTMAX,
        ),
        ("step not counted", "step=state.step + 1", "step=state.step", SOFTMAX),
        (
            "one key for warp, mix and network",
            "warp_key, mix_key, network_key = jax.random.split(key, 3)",
            "warp_key = mix_key = network_key = key",
            DRAWS,
        ),
        (
            "gradient of the last micro-batch",
            "jax.tree.map(jnp.add, total, gradients), each",
            "gradients, each",
            SIGMOID,
        ),
        (
            "masked rows have a loss",
            "jnp.where(mask, per_example(logits, targets), 0)",
            "per_example(logits, targets)",
            EVALUATION,
        ),
        (
            "evaluation is smoothed",
            "targets = losses.one_hot(labels, classes)\n",
            "targets = losses.smooth(losses.one_hot(labels, classes), settings.label_smoothing)\n",
            EVALUATION,
        ),
        ("frozen parameters in the logged norm", "p if on else jax.lax.stop_gradient(p)", "p", SIGMOID),
        ("flipped by host and device", "if not crop_on_device:", "if False:", SIGMOID),
        (
            "top-1 of masked rows",
            "top_k_correct(logits, labels, 1) & mask",
            "top_k_correct(logits, labels, 1)",
            EVALUATION,
        ),
        ("masked rows counted", "jnp.sum(mask, dtype=jnp.int32)", "jnp.sum(mask | True, dtype=jnp.int32)", EVALUATION),
        (
            "evaluation resizes bilinearly",
            "augment.resize(images, size, data.interpolation)",
            'augment.resize(images, size, "bilinear")',
            WHOLE_IMAGES,
        ),
        (
            "mean over batch of the device",
            "jnp.sum(each) / settings.batch_size",
            "jnp.sum(each) / each.shape[0]",
            SIGMOID,
        ),
    ],
    "train.py": [
        (
            "a best between two saves is lost",
            "if saving or (evaluating and self.checkpoints.would_keep(self._measured())):",
            "if saving:",
            "test_loop.py::test_the_best_is_saved_when_it_is_measured_however_seldom_checkpoints_are",
        ),
    ],
}
