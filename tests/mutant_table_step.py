"""The part of `mutant_table.py` that is of the model and of its steps."""

_UPDATE, _EVALUATION = "step/test_update.py", "step/test_evaluation.py"
_FOUR_STEPS = f"{_UPDATE}::test_four_steps_agree_with_the_reference"
SOFTMAX = f"{_FOUR_STEPS}[softmax on one device]"
SIGMOID = f"{_FOUR_STEPS}[sigmoid in 2 micro-batches on one device]"
SIGMOID_ON_4 = f"{_FOUR_STEPS}[sigmoid in 4 micro-batches on data=2 x fsdp=2]"
DRAWS = f"{_UPDATE}::test_no_two_steps_micro_batches_blocks_or_examples_share_a_random_number"
SEED = f"{_UPDATE}::test_the_seed_and_the_step_alone_decide_how_a_batch_is_mixed"
EVALUATION = f"{_EVALUATION}::test_an_evaluation_sums_loss_and_correct_answers_of_the_rows_that_count"
UNCROPPED = f"{_EVALUATION}::test_uncropped_images_are_cropped_to_the_centre_and_resized_on_the_device"
ACTIVATION = "model/test_activations.py::test_an_activations_derivative_is_that_of_float64"
BARRIER = "model/test_recompute.py::test_the_backward_pass_runs_the_function_again_behind_a_barrier"
BIAS = "model/test_product.py::test_a_bias_gradient_in_bfloat16_is_summed_in_float32"
LAYER_NORM = "model/test_recompute.py::test_the_gradients_of_a_norm_are_those_of_a_plain_one"
RMS_NORM = "model/test_layers.py::test_rms_norm_divides_by_the_root_of_the_mean_square_and_has_no_bias"
SEVERAL = "model/test_product.py::test_the_gradients_of_products_with_several_kernels_are_those_of_plain_ones"
KEPT_INPUTS = "model/test_recompute.py::test_the_inputs_are_all_that_is_kept"
CHOICES, KERNELS = "model/test_choices.py::test_", "model/test_kernels.py::test_"
LORA = "model/test_lora.py::test_an_adapted_model_is_that_of_the_sums_in_value_and_gradient"
LORA_NEW = f"{LORA}[False-gelu]"
TRAINED = "step/test_trained.py::test_"
PALLAS = "model/test_tpu_attention.py::test_the_kernel_and_its_gradients_are_attention_in_float32"
VIT = "model/test_vit.py::test_logits_and_gradients_agree_with_the_reference"
SPLIT = "model/test_vit.py::test_logits_and_gradients_of_split_tokens_heads_and_parameters_are_those_of_one_device"
ROPE = "model/test_position.py::test_rope2d_turns_by_two_pi_times_the_centre_of_the_patch_over_each_period"
ON_DEVICE = "step/test_evaluation.py::test_the_device_crops_as_the_host_does_within_a_grey_level"

STEP_TABLE: dict[str, list[tuple[str, ...]]] = {
    "model/attention.py": [
        ("scores by the whole width", "q * q.shape[-1] ** -0.5", "q * (q.shape[-2] * q.shape[-1]) ** -0.5", SOFTMAX),
        (
            "keys and values swapped",
            'q, k, v = (_named(y, "qkv")',
            'q, v, k = (_named(y, "qkv")',
            SOFTMAX,
        ),
        (
            "queries and keys swapped in the scores' gradients",
            "q, k = saved\n    g = g.astype",
            "k, q = saved\n    g = g.astype",
            "model/test_attention.py::test_the_gradients_of_scores_are_those_of_a_plain_product[self-attention]",
        ),
        (
            "scores' gradients multiplied in an 8-bit float",
            "    g = g.astype(q.dtype)\n",
            "    g = g.astype(jnp.float8_e5m2).astype(q.dtype)\n",
            "model/test_attention.py::test_rounding_the_gradient_of_scores_adds_no_more_than_half_to_the_error",
        ),
        (
            "padding attended to in a block",
            "keys[0], tokens=self.tokens)",
            "keys[0])",
            KERNELS + "an_odd_number_of_tokens_is_padded_once_and_nothing_sees_the_padding",
        ),
        ("attention weights never dropped", ".astype(v.dtype), rate, key)", ".astype(v.dtype), 0.0, key)", DRAWS),
    ],
    "model/choices.py": [
        (
            "blocks always unrolled",
            "depth > UNROLLED_DEPTH.get(platform, 0)",
            "depth > 99",
            CHOICES + "blocks_are_unrolled_up_to_a_depth_of_each_platform",
        ),
        (
            "no memory left beside saved arrays",
            "<= SHARE * memory_bytes",
            "<= memory_bytes",
            CHOICES + "remat_is_the_least_that_leaves_half_of_the_memory",
        ),
    ],
    "model/context.py": [
        (
            "the softmax's derivative without its mean, token by token",
            "(weights_gradient - delta[..., None])",
            "weights_gradient",
            "model/test_context.py::test_the_second_derivative_is_that_of_full_attention",
        ),
    ],
    "model/kernels.py": [
        (
            "kernels although weights are dropped",
            'dtype != "bfloat16" or drops',
            'dtype != "bfloat16"',
            KERNELS + "auto_is_xla_on_other_hardware_in_float32_and_with_dropped_weights",
        ),
        (
            "padding attended to",
            "query_seq_lengths=queries, key_value_seq_lengths=keys, ",
            "",
            KERNELS + "cudnn_inside_all_to_all_attention_leaves_padding_out",
        ),
    ],
    "model/tpu_attention.py": [
        ("rows of weights that do not add up to 1", "weights = weights / total", "weights = weights", PALLAS),
        (
            "the backward kernel is differentiated",
            "return _gradients(*saved, g,",
            "return _gradients.__wrapped__(*saved, g,",
            "model/test_tpu_attention.py::test_a_second_derivative_is_refused_with_what_to_set",
        ),
        ("the softmax's derivative without its mean", "(d_weights - mean)", "d_weights", PALLAS),
    ],
    "model/layers.py": [
        (
            "dropout not scaled",
            "jnp.where(keep, x / (1 - rate),",
            "jnp.where(keep, x,",
            "model/test_layers.py::test_dropout_zeroes_at_its_rate_and_keeps_the_mean",
        ),
        (
            "neighbours share a mask",
            "bits >> 16",
            "bits & 0xFFFF",
            "model/test_layers.py::test_neighbours_are_dropped_independently",
        ),
        (
            "drop-path not scaled",
            "((draws >= rate) / (1 - rate))",
            "(draws >= rate)",
            "model/test_layers.py::test_drop_path_drops_whole_examples_at_its_rate_and_scales_the_rest_up",
        ),
        ("a norm's bias not folded", "for array in (bias, shift) if", "for array in (bias,) if", VIT),
        (
            "examples share a mask",
            "shape = (x.shape[1], x.shape[0], *x.shape[2:])\n",
            "shape = (x.shape[1], 1, *x.shape[2:])\n",
            DRAWS,
        ),
    ],
    "model/lora.py": [
        ("alpha is not divided by the rank", "settings.alpha / settings.rank", "settings.alpha", f"{LORA}[True-gelu]"),
        (
            "a norm's bias is not adapted",
            "self.up.each(self.down(x, norm=norm) *",
            "self.up.each(self.down(x) *",
            LORA_NEW,
        ),
    ],
    "model/norm.py": [
        (
            "the epsilon of the config is not used",
            "self.kind, self.epsilon = model.norm, model.norm_epsilon",
            "self.kind, self.epsilon = model.norm, 1e-6",
            VIT,
        ),
        ("LayerNorm's derivative without the variance's", "(y * along + ", "(", LAYER_NORM),
        (
            "RMSNorm subtracts the mean",
            "return x * jax.lax.rsqrt(",
            "return (x - jnp.mean(x)) * jax.lax.rsqrt(",
            RMS_NORM,
        ),
    ],
    "model/pooling.py": [
        ("the mean over all tokens", "/ (stop - start)", "/ x.shape[1]", SPLIT),
        ("padding is pooled", "x = jnp.where(mask[:, None], x, 0)", "pass", SPLIT),
    ],
    "model/activations.py": [
        ("quick GELU's factor is GELU's", "1.702 * wide", "1.5957691 * wide", ACTIVATION),
        (
            "gelu's forms swapped",
            '"gelu": gelu,\n    "gelu_tanh": gelu_tanh,',
            '"gelu": gelu_tanh,\n    "gelu_tanh": gelu,',
            SOFTMAX,
        ),
        ("the logistic form's argument halved", "math.sqrt(8 / math.pi)", "math.sqrt(2 / math.pi)", ACTIVATION),
    ],
    "model/block.py": [
        (
            "attention without its norm",
            "attended = self.attention(h, keys[0]",
            "attended = self.attention(x, keys[0]",
            SOFTMAX,
        ),
        (
            "no residual around attention",
            "x = add(x, drop_path(attended, path_rate, keys[1]))",
            "x = drop_path(attended, path_rate, keys[1])",
            SOFTMAX,
        ),
        ("MLP and attention share a key", "self.mlp(h, keys[2]", "self.mlp(h, keys[0]", DRAWS),
        ("LayerScale forgotten", "norm, self.scale2)", "norm, None)", SIGMOID),
    ],
    "model/product.py": [
        (
            "bias's gradient summed in the activations' dtype",
            "jax.lax.reduce_sum(g.astype(jnp.float32), rows, out_sharding=layout.gradient_spec(bias, (0,)))",
            "jax.lax.reduce_sum(g, rows, out_sharding=layout.gradient_spec(bias, (0,))).astype(jnp.float32)",
            BIAS,
        ),
        ("x's gradient of the first kernel alone", "functools.reduce(jnp.add, parts)", "next(parts)", SEVERAL),
        (
            "the narrower operand's product not transposed",
            "    return jax.lax.optimization_barrier(transposed).T",
            "    return jax.lax.optimization_barrier(transposed).reshape(kernel.shape)",
            SEVERAL,
        ),
    ],
    "model/position.py": [
        (
            "the table's gradient is the examples' mean",
            "jnp.ones(g.shape[:1], g.dtype,",
            "jnp.full(g.shape[:1], 1 / g.shape[0], g.dtype,",
            "model/test_position.py::test_the_gradients_of_adding_a_table_are_those_of_a_plain_sum",
        ),
        ("rope2d measures from patches' corners", "(2 * jnp.arange(side) + 1)", "(2 * jnp.arange(side))", ROPE),
        ("rope2d turns the special tokens", "((before, after), (0, 0))", "((0, before + after), (0, 0))", ROPE),
        (
            "a rotation's derivative turns on",
            "rotate(g, (cosine, -sine))",
            "rotate(g, (cosine, sine))",
            "model/test_position.py::test_the_gradients_of_a_rotation_are_those_of_a_plain_one",
        ),
        (
            "rows and columns are rescaled apart",
            "draws[2] * math.log(rescale)",
            "draws[1:] * math.log(rescale)",
            "model/test_position.py::test_a_random_stretch_is_uniform_in_its_logarithm_and_shares_the_rescaling",
        ),
    ],
    "model/recompute.py": [
        ("no barrier", "jax.lax.optimization_barrier(inputs)", "inputs", BARRIER),
        (
            "intermediate results kept",
            "return function(*inputs), inputs",
            "return jax.vjp(function, *inputs)",
            KEPT_INPUTS,
        ),
    ],
    "model/vit.py": [
        (
            "blocks share a key",
            "jax.random.split(key, depth)",
            "jax.random.split(key, 1)[jnp.zeros(depth, int)]",
            DRAWS,
        ),
        ("registers are pooled", "(self.shape.special, self.shape.tokens)", "(0, self.shape.tokens)", VIT),
        (
            "the norm of embeddings left out",
            "            x = self.embedding_norm(x)\n        return x, self",
            "            pass\n        return x, self",
            VIT,
        ),
        ("what is pooled is not normalised", "x = self.pooled_norm(x)", "pass", VIT),
        (
            "rope2d is jittered in evaluation",
            "if key is not None and (",
            "key = jax.random.key(0)\n        if (",
            "model/test_vit.py::test_rope2d_is_jittered_in_training_alone",
        ),
        ("class token without a position", "cls + position[:1] if cls_positions else cls", "cls", SOFTMAX),
        (
            "drop-path not linear",
            'first = 0 if self.model.drop_path_schedule == "linear" else self.model.drop_path',
            "first = self.model.drop_path",
            "model/test_vit.py::test_drop_path_follows_its_schedule_and_every_branch_of_every_block_draws_separately",
        ),
        (
            "head's bias wrong at the start",
            "bias=model.head_bias",
            "bias=0.0",
            "model/test_vit.py::test_a_new_model_starts_as_in_the_papers",
        ),
    ],
    "step/arrays.py": [
        (
            "small arrays not in the norm",
            "    if small:",
            "    if not sums:",
            "step/test_arrays.py::test_the_norm_is_that_of_all_numbers_on_every_mesh",
        ),
        (
            "a gathered gradient not split again",
            " and not layout.split_axes(stored)",
            "",
            "step/test_arrays.py::test_gradients_are_reduced_as_one_by_one_and_the_small_ones_as_one_array",
        ),
    ],
    "step/augment.py": [
        (
            "partner from the device's own rows",
            "return jnp.asarray(array).at[partners(array.shape[0], repeats)].get(out_sharding=layout.spec_of(array))",
            "return _on_local_rows(lambda rows: rows[::-1], array)",
            "step/test_augment.py::test_warps_and_mixes_are_the_same_on_every_mesh",
        ),
        (
            "an example mixed with its own repetition",
            "return 1 << (repeats - 1).bit_length()",
            "return 1",
            "step/test_augment.py::test_no_example_is_mixed_with_its_own_repetition",
        ),
        (
            "lambda near a half",
            "power / (1 - power)",
            "1 / (1 - power)",
            "step/test_augment.py::test_lambda_has_the_distribution_beta",
        ),
        ("targets not mixed", "targets * share + _of_partners(targets, repeats) * (1 - share)", "targets", SOFTMAX),
        ("cutmix keeps the drawn share", "share = jnp.where(cut, weights.mean(), share)", "share = share", SIGMOID),
        (
            "a box that does not fit is taken",
            "fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)",
            "fits = (widths > 0) & (heights > 0)",
            "data/pictures/test_crop.py::test_the_device_draws_boxes_by_the_law_of_the_host",
        ),
    ],
    "step/evaluation.py": [
        ("bicubic overshoots", "jnp.clip(jnp.round(images), 0, 255)", "jnp.round(images)", ON_DEVICE),
        ("filled with black", "return jnp.pad(kept - fill, edges) + fill", "return jnp.pad(kept, edges)", ON_DEVICE),
        (
            "eval_crop ignored on the device",
            "if augment_on_device and data.eval_crop is not None:",
            "if False:",
            UNCROPPED,
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
            UNCROPPED,
        ),
    ],
    "step/losses.py": [
        ("sigmoid's mean over classes", "per_class.sum(axis=-1)", "per_class.mean(axis=-1)", SIGMOID),
    ],
    "step/optimizer.py": [
        (
            "layer decay from the last block's rate on",
            "np.arange(depth, 0, -1,",
            "np.arange(depth - 1, -1, -1,",
            SIGMOID,
        ),
        ("the embedding decays as the first block", "depth + 1 if re.match", "depth if re.match", SIGMOID),
        (
            "clip after the direction",
            "    transforms = [] if settings.clip is None else [_clip(settings.clip)]\n"
            "    transforms.append(DIRECTIONS[name](settings))",
            "    transforms = [DIRECTIONS[name](settings)]\n"
            "    transforms += [] if settings.clip is None else [_clip(settings.clip)]",
            SOFTMAX,
        ),
        ("no clip", "[_clip(settings.clip)]", "[]", SOFTMAX),
        ("clip element by element", "_clip(settings.clip)", "optax.clip(settings.clip)", SOFTMAX),
        ("decay on biases", "float(is_kernel(path))", "1.0", SOFTMAX),
        (
            "b1 and b2 swapped",
            "settings.b1, settings.b2, settings.eps, mu",
            "settings.b2, settings.b1, settings.eps, mu",
            SOFTMAX,
        ),
        ("rates of rules ignored", "optax.masked(optax.scale(factor), mask)", "optax.identity()", SIGMOID),
        (
            "schedule ignored by the optimizer",
            "scale_by_learning_rate(make_schedule(settings, total_steps))",
            "scale_by_learning_rate(settings.learning_rate)",
            SOFTMAX,
        ),
    ],
    "step/trained.py": [
        (
            "the base of adapters is trained",
            'Rule("^(?!head/)(?!.*/lora/)", frozen=True)',
            'Rule("^(?!head/)(?!.*/lora/)")',
            f"{TRAINED}adapters_cost_no_gradient_of_the_kernels_and_state_for_themselves_alone[model.scan=true]",
        ),
        (
            "one block more is frozen",
            "return depth - count",
            "return depth - count + 1",
            f"{TRAINED}blocks_before_the_first_that_is_trained_keep_no_activations",
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
            '"grad_norm": arrays.norm(gradients)',
            '"grad_norm": arrays.norm(updates)',
            SOFTMAX,
        ),
        (
            "one key for all micro-batches",
            "(sliced, jax.random.split(key, micro_batches))",
            "(sliced, jax.random.split(key, 1)[jnp.zeros(micro_batches, int)])",
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
            "micro-batches' means summed",
            "jnp.sum(example_losses) / settings.batch_size",
            "jnp.mean(example_losses)",
            SIGMOID,
        ),
        (
            "EMA of the old parameters",
            "average(own_ema, own,",
            "average(own_ema, trained.parted(state.parameters, rules)[0],",
            SOFTMAX,
        ),
        ("step not counted", "step=state.step + 1", "step=state.step", SOFTMAX),
        (
            "one key for warp, mix and dropout",
            "warp_key, mix_key, dropout_key = jax.random.split(key, 3)",
            "warp_key = mix_key = dropout_key = key",
            DRAWS,
        ),
        (
            "gradient of the last micro-batch",
            "jax.tree.map(jnp.add, total, gradients), example_losses",
            "gradients, example_losses",
            SIGMOID,
        ),
        ("flipped by host and device", "if not augment_on_device:", "if False:", SIGMOID),
    ],
}
