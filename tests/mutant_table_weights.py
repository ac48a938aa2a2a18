"""Mutants of the modules that read and fit published weights, and prepare images for them; see `mutant_table.py`."""

TIMM_FITTING = "weights/test_fitting.py::test_a_fitted_tensor_is_timms"
PIXELS = "weights/test_preprocessing.py::test_pixels_are_those_of_the_peer_within_a_grey_level"
ORIENTED = "weights/test_preprocessing.py::test_an_image_stored_in_any_orientation_has_the_same_pixels"
PROCESSOR = "weights/test_preprocessing.py::test_a_processors_config_becomes_keys"
PLACES = "data/pictures/test_crop_modes.py::test_sizes_are_rounded_as_in_timm"
REFUSED = "weights/test_preprocessing.py::test_what_a_processor_does_not_say_or_we_cannot_do_names_the_key_to_set"
OUTPUTS = "weights/test_published.py::test_outputs_are_those_of_their_own_library"

WEIGHTS_TABLE: dict[str, list[tuple[str, ...]]] = {
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
        ("gate and value exchanged", '("w1", "w2", "w3")', '("w2", "w1", "w3")', OUTPUTS + "[meta_dinov3_plus]"),
        ("the epsilon of others", '"norm_epsilon": 1e-5', '"norm_epsilon": 1e-6', OUTPUTS + "[meta_dinov3]"),
        ("keys with a bias", "(qkv[0], None, qkv[2])", "qkv", OUTPUTS + "[meta_dinov3]"),
        (
            "any periods",
            "rtol=0.01",
            "rtol=1e9",
            "weights/test_published.py::test_periods_that_are_not_dinov3s_are_an_error",
        ),
    ],
    "weights/families/flax_npz.py": [
        ("computed positions left out", '"sincos2d"', '"none"', OUTPUTS + "[npz_big_vision_sincos]"),
        ("GELU of others", '"gelu_tanh"', '"gelu"', OUTPUTS + "[npz_augreg_in21k]"),
        (
            "no position for the class token",
            'model["class_token"] and math.isqrt(count)',
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
    "weights/families/transformers.py": [
        (
            "CLIP classifies normalised patches",
            '{"pool": "mean", "pool_norm": "none"}',
            '{"pool": "mean"}',
            OUTPUTS + "[hf_clip_classifier]",
        ),
    ],
}
