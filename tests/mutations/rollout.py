"""Prompts as trainers read them, and rewards that abstain or are none."""

from tests.mutants import Mutation

ABSTAINING, TEMPLATES = "tests/rollout/test_abstaining.py", "tests/rollout/test_templates.py"
MUTATIONS = [
    Mutation(
        "a BOS before a chat that writes none",
        f"{TEMPLATES}::test_chat_prompts_are_those_of_apply_chat_template",
        "rollout/template.py", "    writes_special_tokens: ClassVar[bool] = True",
        "    writes_special_tokens: ClassVar[bool] = False",
    ),
    Mutation(
        "a BOS before sampled chats alone",
        f"{TEMPLATES}::test_chat_prompts_are_those_of_apply_chat_template",
        "rollout/generator.py", "[encode(self.tokenizer, text, name, self._adds) for",
        "[encode(self.tokenizer, text, name) for",
    ),
    Mutation(
        "a BOS before written chats alone",
        f"{TEMPLATES}::test_chat_prompts_are_those_of_apply_chat_template",
        "rollout/generator.py", "prompt_ids = encode(self.tokenizer, text, own, self._adds)",
        "prompt_ids = encode(self.tokenizer, text, own)",
    ),
    Mutation(
        "no BOS before a text",
        f"{TEMPLATES}::test_texts_are_read_as_the_tokenizer_reads_them",
        "rollout/template.py", 'getattr(template, "writes_special_tokens", False)',
        'getattr(template, "writes_special_tokens", True)',
    ),
    Mutation(
        "a chat's boundary is looked for behind a BOS",
        f"{TEMPLATES}::test_a_chat_is_one_text_with_its_response",
        "rollout/generator.py", "prompt_ids + words, own, self._adds)",
        "prompt_ids + words, own)",
    ),
    Mutation(
        "a second BOS before a text that has one",
        f"{TEMPLATES}::test_a_bos_that_stands_in_a_text_is_not_doubled",
        "rollout/guards.py", "adds = add_special_tokens and not (bos and text.startswith(bos))",
        "adds = add_special_tokens",
    ),
    Mutation(
        "a chat template's own words are lost",
        f"{TEMPLATES}::test_what_a_chat_template_says_is_passed_on",
        "rollout/template.py", 'f"{error}. {advice} the template',
        'f"{advice} the template',
    ),
    Mutation(
        "who abstains has a reward of 0",
        f"{ABSTAINING}::test_baselines_are_of_the_judged_as_in_trl",
        "rollout/batch.py", 'float("nan") if record.reward is None else record.reward',
        "0.0 if record.reward is None else record.reward",
    ),
    Mutation(
        "the only judged one of a group is an error",
        f"{ABSTAINING}::test_baselines_are_of_the_judged_as_in_trl",
        "rollout/advantages.py", "seen &= ((share * size).round() != 1) | (size == 1)",
        "pass",
    ),
    Mutation(
        "RLOO of single completions is silent",
        f"{ABSTAINING}::test_rloo_still_needs_two_completions",
        "rollout/advantages.py", "seen &= ((share * size).round() != 1) | (size == 1)",
        "seen &= (share * size).round() != 1",
    ),
    Mutation(
        "advantages in the places of others",
        f"{ABSTAINING}::test_rules_of_the_user_see_the_judged_alone",
        "rollout/advantages.py", "masked_scatter(seen.to(values.device), values)",
        "masked_scatter(seen.sort().values, values)",
    ),
    Mutation(
        "a reward that nobody gave abstains",
        f"{ABSTAINING}::test_a_reward_that_nobody_gave_is_no_abstention",
        "rollout/batch.py", "[record for record in self.records if not record.abstained]",
        "[]",
    ),
    Mutation(
        "abstentions are not kept",
        f"{ABSTAINING}::test_sampled_batches_say_who_abstained",
        "rollout/files.py", '*(() if record.abstained else ("abstained",))',
        '"abstained"',
    ),
    Mutation(
        "abstentions are silent",
        f"{ABSTAINING}::test_a_reward_that_judges_nothing",
        "rollout/generator.py", "check_abstained(records, panel.name)",
        "pass",
    ),
    Mutation(
        "a text is a number",
        f"{ABSTAINING}::test_what_is_no_reward_names_sequence_function_and_value",
        "rollout/rewards.py", "return float(number) if isinstance(number, Real | Decimal) else None",
        "return float(number)",
    ),
    Mutation(
        "an infinite reward",
        f"{ABSTAINING}::test_what_is_no_reward_names_sequence_function_and_value",
        "rollout/judging.py", "if value is None or not isfinite(value):",
        "if value is None:",
    ),
    Mutation(
        "NaN for a weight",
        f"{ABSTAINING}::test_no_number_of_a_record_is_nan",
        "rollout/record.py", 'for name in ("reward", "advantage", "weight")}',
        'for name in ("reward", "advantage")}',
    ),
    Mutation(
        "a saved batch is told by its ids",
        "tests/study/test_kept.py::test_a_saved_batch_is_the_one_of_the_results",
        "rollout/files.py", "load_batch(place) == batch", "load_batch(place).ids == batch.ids",
    ),
    Mutation(
        "weights on what is no response",
        "tests/rollout/test_token_weights.py::test_what_is_no_token_weight_names_sequence_and_part",
        "rollout/layout.py", "_refuse((tensor != 0) & ~mask, tensor,",
        "_refuse((tensor != 0) & False, tensor,",
    ),
    Mutation(
        "every part of a reward by a scale of its own",
        "tests/rollout/test_reward_functions.py::test_the_parts_add_up",
        "rollout/reward_parts.py", "scale = group_scale(judged, of)", "scale = group_scale(part, of)",
    ),
    Mutation(
        "rewards that cancel have parts that are divided by nothing",
        "tests/rollout/test_reward_functions.py::test_where_functions_cancel_nobody_has_an_advantage_and_none_a_part",
        "rollout/reward_parts.py", "scale - EPSILON < ROUNDING", "scale < 0.0",
    ),
]  # fmt: skip
