"""Mutants of the modules that read published weights, fit them and prepare images for them; see `mutant_table.py`."""

TIMM_FITTING = "weights/test_fitting.py::test_a_fitted_tensor_is_timms"
PIXELS = "weights/test_preprocessing.py::test_pixels_are_those_of_the_peer_within_a_grey_level"
ORIENTED = "weights/test_preprocessing.py::test_an_image_stored_in_any_orientation_has_the_same_pixels"
PROCESSOR = "weights/test_preprocessing.py::test_a_processors_config_becomes_keys"
PLACES = "data/pictures/test_crop_modes.py::test_sizes_are_rounded_as_in_timm"
REFUSED = "weights/test_preprocessing.py::test_what_a_processor_does_not_say_or_we_cannot_do_names_the_key_to_set"
OUTPUTS = "weights/test_published.py::test_outputs_are_those_of_their_own_library"
OTHER_SHAPE = "weights/test_broken_tensors.py::test_a_tensor_of_another_shape_is_named[timm_vit_cls]"
NOBODYS = "weights/test_broken_tensors.py::test_a_tensor_of_nobody_is_named[hf_vit]"
SHARE = "weights/test_lazy.py::test_a_share_of_the_heads_reads_their_rows_alone"
CHAIN = "weights/test_lazy.py::test_any_slice_of_a_random_chain_is_that_of_the_whole"
OTHER_GRID = "weights/test_adapted.py::test_positions_are_resampled_after_those_of_special_tokens"
AGAIN = "weights/test_writing.py::test_a_file_that_was_read_is_written_again_bit_by_bit"
EQUAL = "weights/test_writing.py::test_a_format_without_the_model_gets_one_that_computes_the_same"
REFUSED_MODEL = "weights/test_writing.py::test_what_a_format_cannot_express_names_the_key_and_its_value"
NO_EPSILON = "model.norm_epsilon: 1e-12, which timm cannot express: .* has 1e-06"
HALF_WAY = "exporting/test_export.py::test_an_export_that_fails_half_way_leaves_nothing"
HEAD = "weights/test_adapted.py::test_the_head_is_taken_by_the_names_of_classes"

WEIGHTS_TABLE: dict[str, list[tuple[str, ...]]] = {
    "weights/earlier_run.py": [
        (
            "predict by the plain parameters",
            'return "ema" if settings.ema_decay else "parameters"',
            'return "parameters"',
            "step/test_evaluation.py::test_predict_gives_the_probabilities_of_the_loss_by_the_moving_average",
        ),
        (
            "merged adapters without their factor",
            "np.float32(factor) * added",
            "added",
            "test_fine_tuning.py::test_adapters_start_from_the_weights_and_are_merged_where_a_run_is_opened[true]",
        ),
    ],
    "weights/naming.py": [
        (
            "rows and columns of a patch exchanged",
            "tensor.transposed(2, 3, 1, 0)",
            "tensor.transposed(3, 2, 1, 0)",
            f"{OUTPUTS}[timm_vit_cls]",
        ),
        (
            "a square kernel is not transposed",
            "tensor = tensor.transposed(1, 0)",
            "tensor = tensor.transposed(1, 0) if tensor.shape[0] != tensor.shape[1] else tensor",
            f"{OUTPUTS}[hf_vit]",
        ),
        (
            "queries, keys and values are all queries",
            "(part.start * share, part.stop * share)",
            "(0, (part.stop - part.start) * share)",
            f"{OUTPUTS}[timm_vit_cls]",
        ),
        (
            "as many numbers in another shape are taken",
            "if found not in allowed:",
            "if math.prod(found) != math.prod(allowed[0]):",
            OTHER_SHAPE,
        ),
        (
            "rows and columns of a written patch exchanged",
            "array.transpose(3, 2, 0, 1)",
            "array.transpose(3, 2, 1, 0)",
            f"{AGAIN}[timm_vit_cls]",
        ),
        (
            "two scales of one tensor need not be equal",
            "key in filled and not np.array_equal(rows, value)",
            "False",
            "weights/test_writing.py::test_two_scales_that_timm_has_one_tensor_for_must_be_equal",
        ),
        ("a tensor of nobody is not looked at", "        if unknown:\n", "        if False:\n", NOBODYS),
    ],
    "weights/tokens.py": [
        (
            "a position that ours has no row for is lost",
            "lambda a, b: a + b",
            "lambda a, b: a",
            f"{OUTPUTS}[hf_deit]",
        ),
        (
            "the position of the class token is written as that of a register",
            "[rows[:own], unused, rows[own:]]",
            "[unused, rows[:own], rows[own:]]",
            "weights/test_writing.py::test_every_file_is_read_as_the_model_that_was_written[hf_deit-huggingface]",
        ),
    ],
    "weights/equivalents.py": [
        (
            "the head of the class token is that of the mean",
            'halves if pool == "cls" else halves[::-1]',
            'halves if pool == "mean" else halves[::-1]',
            f"{EQUAL}[huggingface-{{'registers': 4}}-{{'layer_scale': 1.0, 'pool': 'cls_mean'}}]",
        ),
        (
            "the bias of patches is lost",
            "position[before:] + bias",
            "position[before:]",
            f"{EQUAL}[timm-{{'embedding_norm': 'tokens', 'norm_epsilon': 1e-05}}-{{}}]",
        ),
    ],
    "weights/writing.py": [
        (
            "a model that a format cannot express is written as another",
            "        if not wrong:\n",
            "        if True:\n",
            f"{REFUSED_MODEL}[timm-{{'norm_epsilon': 1e-12}}-{NO_EPSILON}]",
        ),
    ],
    "exporting/verb.py": [
        (
            "what is half written stays",
            "        shutil.rmtree(beside, ignore_errors=True)\n",
            "        pass\n",
            HALF_WAY,
        ),
    ],
    "exporting/function.py": [
        (
            "pixels are taken as normalised",
            'if input == "uint8" else images',
            'if input == "float32" else images',
            "exporting/test_export.py::test_stablehlo_gives_the_same_logits_in_a_process_with_jax_alone[uint8]",
            "ConfigError",
        ),
    ],
    "weights/lazy.py": [
        ("a part begins at 0", "slice(start + index[axis].start,", "slice(index[axis].start,", CHAIN, "ValueError"),
        (
            "all is read to transpose a share",
            "self.read(tuple(index[axis] for axis in inverse)).transpose(axes)",
            "self.read().transpose(axes)[index]",
            SHARE,
        ),
        (
            "all blocks are read for one",
            "chosen = parts[index[axis]]",
            "chosen = [part for part in parts if part.read().size][index[axis]]",
            "weights/test_lazy.py::test_one_block_of_stacked_blocks_reads_that_block_alone",
        ),
    ],
    "weights/adapted.py": [
        (
            "parameters without a place are dropped",
            "    if rest:\n",
            "    if False:\n",
            "test_initial.py::test_a_tensor_for_which_the_model_has_no_place_is_named",
        ),
        (
            "rows and columns of the new grid exchanged",
            "old.grid, new.grid, before",
            "old.grid, new.grid[::-1], before",
            OTHER_GRID,
        ),
        (
            "a share is read for each device",
            "if key not in read:",
            "if True:",
            "weights/test_adapted.py::test_a_share_that_several_devices_hold_is_read_once",
        ),
        ("the bias of a head in the old order", "lambda whole: whole[rows]", "lambda whole: whole[: len(rows)]", HEAD),
        (
            "two classes of one name are one",
            "if times[name] == 1",
            "if True",
            "weights/test_adapted.py::test_two_classes_of_one_name_are_not_confused",
        ),
    ],
    "weights/families/transformers.py": [
        (
            "CLIP classifies normalised patches",
            '{"pool": "mean", "pool_norm": "none"}',
            '{"pool": "mean"}',
            f"{OUTPUTS}[hf_clip_classifier]",
        ),
        (
            "queries and keys exchanged",
            '("query", "key", "value"))',
            '("key", "query", "value"))',
            f"{OUTPUTS}[hf_vit]",
        ),
        (
            "the gate is taken for the values it gates",
            '"mlp/gate": Part("mlp.weights_in.{}", 0, 1, 2)',
            '"mlp/gate": Part("mlp.weights_in.{}", 1, 2, 2)',
            f"{OUTPUTS}[hf_dinov2_giant]",
        ),
        ("everything may be left out", '".*mask_token$"', '".*"', NOBODYS),
        ("quick GELU is GELU", '"quick_gelu": "quick_gelu"', '"quick_gelu": "gelu"', f"{OUTPUTS}[hf_clip]"),
        (
            "the epsilon of timm",
            'key("layer_norm_eps", PositiveFloat, "norm_epsilon")',
            "1e-6",
            f"{OUTPUTS}[hf_vit]",
        ),
        (
            "labels in the order of the file",
            "tuple(str(labels[number]) for number in numbers)",
            "tuple(map(str, labels.values()))",
            "weights/test_broken_configs.py::test_labels_stand_in_the_order_of_their_numbers",
        ),
    ],
    "weights/families/timm.py": [
        (
            "the biases of queries and values exchanged",
            '("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias")',
            '("blocks.#.attn.v_bias", None, "blocks.#.attn.q_bias")',
            f"{OUTPUTS}[timm_dinov3]",
        ),
    ],
    "weights/fitting.py": [
        ("prefix tokens are lost", "np.concatenate([kept, resized", "np.concatenate([kept * 0, resized", TIMM_FITTING),
        (
            "a patch kernel resized like an image",
            'np.linalg.pinv(resize_matrix(*sides, "bicubic")).T',
            'resize_matrix(*sides, "bicubic")',
            TIMM_FITTING,
        ),
        ("more channels without the scale", "* (old / channels)", "* 1.0", TIMM_FITTING),
        ("one channel is the mean", "kernel.sum(axis=2,", "kernel.mean(axis=2,", TIMM_FITTING),
        (
            "rows and columns exchanged",
            "np.tensordot(across, rows, axes=(1, 1)), 0, 1)",
            "np.tensordot(across, rows, axes=(1, 1)), 0, 0)",
            TIMM_FITTING,
        ),
    ],
    "data/pictures/resample.py": [
        ("the cubic of OpenCV", "_CUBIC = -0.5", "_CUBIC = -0.75", TIMM_FITTING),
        ("no antialiasing", "widening = max(scale, 1.0)", "widening = 1.0", TIMM_FITTING),
        (
            "not rounded between across and down",
            "column_bits).transpose(1, 0, 2)\n",
            "None).transpose(1, 0, 2)\n",
            PIXELS,
        ),
        (
            "halves down",
            "sums / 2**bits + 0.5",
            "sums / 2**bits + 0.499",
            "data/pictures/test_resample.py::test_bilinear_is_rounded_once",
        ),
        (
            "weights of a byte",
            "2 ** (bits + 1)",
            "2 ** (bits + 8)",
            "data/pictures/test_resample.py::test_bicubic_goes_across_first_and_rounds_between",
        ),
    ],
    "data/pictures/crop_modes.py": [
        ("the size rounded to the nearest", "math.floor(size[0] / ratio)", "round(size[0] / ratio)", PLACES),
        (
            "the long side rounded to the nearest",
            "int(scaled[0] * image[0] / short)",
            "round(scaled[0] * image[0] / short)",
            PIXELS,
        ),
        (
            "transformers' cut rounded as timm's",
            'math.floor(half) if rounding == "transformers" else round(half)',
            "round(half)",
            PIXELS,
        ),
        ("the border cuts", 'max(shrinks) if mode == "border" else min(shrinks)', "min(shrinks)", PIXELS),
        (
            "an odd border is wider before",
            "(new - old) // 2, (new - old + 1) // 2",
            "(new - old + 1) // 2, (new - old) // 2",
            PLACES,
        ),
    ],
    "data/stream/pixels.py": [
        (
            "the quick way for all modes",
            'if data.eval_crop_mode == "fast":\n        choose',
            "if True:\n        choose",
            ORIENTED,
        ),
        ("the crop of an evaluation is not the key's", "ratio = data.eval_crop or 1.0", "ratio = 1.0", PIXELS),
    ],
    "weights/preprocessing.py": [
        (
            "a size of one number is always a square",
            '"shortest_edge" if _PROCESSORS[kind] else "sides"',
            '"sides"',
            PROCESSOR,
        ),
        (
            "the crop over the size without care for rounding",
            "return ratio if math.floor(crop / ratio) == resized else",
            "return ratio if True else",
            PROCESSOR,
            "ConfigError",
        ),
        (
            "a processor that pads is taken",
            '(("do_resize", True), ("do_pad", False))',
            '(("do_resize", True),)',
            REFUSED,
        ),
        (
            "the scale of pixels is not looked at",
            "if not math.isclose(factor, _LEVEL, rel_tol=1e-3):",
            "if False:",
            REFUSED,
        ),
        (
            "what the user has set is read",
            "if key not in given}",
            "}",
            "weights/test_preprocessing.py::test_a_key_that_the_user_has_set_is_not_read",
            "ConfigError",
        ),
    ],
    "weights/families/dinov3.py": [
        ("gate and value exchanged", '("w1", "w2", "w3")', '("w2", "w1", "w3")', f"{OUTPUTS}[meta_dinov3_plus]"),
        ("the epsilon of others", '"norm_epsilon": 1e-5', '"norm_epsilon": 1e-6', f"{OUTPUTS}[meta_dinov3]"),
        ("keys with a bias", "(qkv[0], None, qkv[2])", "qkv", f"{OUTPUTS}[meta_dinov3]"),
        (
            "any periods",
            "rtol=0.01",
            "rtol=1e9",
            "weights/test_published.py::test_periods_that_are_not_dinov3s_are_an_error",
        ),
    ],
    "weights/families/flax_npz.py": [
        ("computed positions left out", '"sincos2d"', '"none"', f"{OUTPUTS}[npz_big_vision_sincos]"),
        ("GELU of others", '"gelu_tanh"', '"gelu"', f"{OUTPUTS}[npz_augreg_in21k]"),
        (
            "no position for the class token",
            "has_cls and math.isqrt(count)",
            'position.endswith("input/pos_embedding") and math.isqrt(count)',
            "weights/test_published.py::test_older_code_has_a_position_for_the_class_token_under_other_names",
            "ConfigError",
        ),
        (
            "no size of images is an error",
            'if not has_size and "model.image_size" not in given',
            "if False",
            "weights/test_published.py::test_computed_positions_need_the_size_of_images",
        ),
    ],
}
