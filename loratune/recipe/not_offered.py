"""Settings of other tools that change what is learnt and that loratune does not offer, with what it does instead."""

from __future__ import annotations

from loratune.recipe.not_needed import named

NOT_OFFERED = {
    **named(
        "use_galore use_apollo use_badam use_adam_mini use_muon "
        "lisa_n_layers lisa_activated_layers optim_target_modules embedding_lr "
        "embedding_lr_scale lr_groups optim_args vit_lr aligner_lr",
        "all trained weights have the same optimizer, a variant of AdamW",
    ),
    **named(
        "use_loftq loftq_config "
        "peft use_qalora use_bdlora "
        "relora use_llama_pro llamapro_num_new_blocks reft_intervention_type lora_ga_direction "
        "nvfp4_merge_aware oft_target oft_block_size mixture_of_depths vision_all_linear",
        "LoRA's variants here are rsLoRA, DoRA, LoRA+, PiSSA and OLoRA",
    ),
    **named(
        "use_dft_loss enable_dft_loss use_asft_loss use_eaft_loss use_eaft label_smoothing_factor loss_type "
        "diffusion ebft router_aux_loss_coef moe_aux_loss_coeff mtp_num_layers channel_loss use_kd kd_trainer",
        "the loss is the mean cross-entropy of the trained tokens",
    ),
    **named(
        "rl trl pref_beta pref_loss rl_beta orpo_alpha kto_desirable_weight reward_model process_reward_model "
        "num_labels center_rewards_coefficient problem_type nemo_gym_enabled hatchery ref_model rlhf_type",
        "it trains answers to questions, without preferences, rewards or classes",
    ),
    **named(
        "pretraining_dataset use_packed_pretraining",
        "plain text is not trained on, only answers to questions",
    ),
    **named(
        "resize_vocab new_special_tokens add_special_tokens tokens add_tokens added_tokens_overrides reinit_weights",
        "the vocabulary stays that of the base",
    ),
    **named(
        "rope_scaling rope_theta max_model_len model_config overrides_of_model_config model_kwargs",
        "the config of the base is used as it is",
    ),
    **named(
        "adapter_name_or_path lora_model_dir resume_from_adapter adapters",
        "training starts from a new adapter",
    ),
    **named(
        "fp8 fp8_format fp8_recipe qat gptq model_quantization_config llmcompressor mixed_precision_fp8",
        "bases are loaded in 32 or 16 bits, or quantised to nf4 or int8",
    ),
    **named(
        "external_plugins custom_register_path callbacks custom_dataset_info reward_funcs chat_template_path "
        "chat_template_jinja",
        "code and templates from outside the model's folder are not run",
    ),
    **named(
        "train_on_eot train_on_eos",
        "the token that ends an answer is always trained, and no other control token",
    ),
    **named(
        "curriculum_sampling sample_packing_sequentially min_sample_len interleave_probs mix_strategy "
        "interleave_prob split_thinking",
        "rows are drawn at random, by the weights of their sources",
    ),
    **named(
        "jagged_restart_steps cosine_min_lr_ratio lr_quadratic_warmup cosine_constant_lr_ratio lr_scheduler_kwargs",
        "schedules end at a rate of 0, without restarts",
    ),
    **named(
        "use_audio audio_type audio_input cached_dataset cached_val_dataset",
        "rows are read from files or hubs, and hold texts",
    ),
    **named(
        "agent_template response_prefix use_chat_template",
        "prompts are rendered by the tokenizer's own template",
    ),
}
"""Name in transformers, TRL, PEFT, LLaMA-Factory, ms-swift, axolotl or unsloth → what loratune does instead."""
