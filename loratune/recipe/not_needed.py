"""Settings of other tools that loratune needs none for, each with the reason; none changes what is learnt."""

from __future__ import annotations


def named(names: str, reason: str) -> dict[str, str]:
    """Return each of the names, which spaces separate, with the reason."""
    return dict.fromkeys(names.split(), reason)


NOT_NEEDED = {
    **named(
        "preprocessing_num_workers dataset_num_proc dataloader_num_workers dataset_processes "
        "dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers",
        "all CPU cores are used, and encoded rows are cached",
    ),
    **named(
        "overwrite_cache load_from_cache_file dataset_prepared_path tokenized_path lazy_tokenize push_dataset_to_hub",
        "rows are encoded again whenever an input has changed",
    ),
    **named(
        "use_liger_kernel liger_kernel liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm "
        "liger_glu_activation liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy",
        "Liger's kernels are used on a GPU if the package is installed",
    ),
    **named(
        "use_unsloth use_unsloth_gc use_v1_kernels kernel_config use_kernels lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum "
        "fused_attn_kernel flex_attn_compile_kwargs cut_cross_entropy use_cce cross_entropy_loss_fusion "
        "cross_entropy_fusion_impl masked_softmax_fusion bias_activation_fusion apply_rope_fusion "
        "gradient_accumulation_fusion use_scattermoe use_sonicmoe experts_implementation experts_impl "
        "moe_grouped_gemm moe_permute_fusion moe_shared_expert_overlap moe_token_dispatcher_type "
        "moe_router_dtype linear_decoupled_in_proj attention_backend tiled_mlp torch_compile "
        "torch_compile_mode torch_compile_backend tf32 use_logits_to_keep use_dsv4_kernels "
        "use_glm_dsa_kernels dsv4_fp4_grouped_mode gemma4_hybrid_attn_impl gptq_disable_exllama "
        "llama4_linearized_experts",
        "the kernels are chosen by the device, and do not change what is learnt",
    ),
    **named(
        "gradient_checkpointing_kwargs gradient_checkpointing_func use_reentrant_gc "
        "vit_gradient_checkpointing recompute_granularity recompute_method recompute_num_layers "
        "recompute_modules activation_offloading offload_params optimizer_cpu_offload "
        "optimizer_offload_fraction use_precision_aware_optimizer exp_avg_dtype exp_avg_sq_dtype "
        "low_cpu_mem_usage experimental_skip_move_to_device torch_empty_cache_steps sequential_offload "
        "init_config bnb_4bit_quant_storage",
        "the free memory decides what is kept and what is computed again",
    ),
    **named(
        "ddp_find_unused_parameters ddp_backend ddp ddp_bucket_cap_mb local_rank device_map "
        "accelerator_config use_cpu no_cuda sequence_parallel sequence_parallel_size sequence_parallel_degree "
        "tensor_parallel_size tensor_model_parallel_size pipeline_model_parallel_size "
        "expert_model_parallel_size expert_tensor_parallel_size expert_parallel_size "
        "expert_parallel_num_nvl_bytes expert_parallel_token_capacity context_parallel_size cp_size cp_mode "
        "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers use_distributed_optimizer "
        "overlap_param_gather overlap_grad_reduce dp_shard_size dp_replicate_size fsdp_config fsdp_version "
        "fsdp_transformer_layer_cls_to_wrap fsdp_final_state_dict_type use_ray ray_num_workers ray_run_name "
        "ray_storage_path use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "tuner_backend",
        "devices decide how a run is computed, not what is learnt; see sft --gpus and model.sharding",
    ),
    **named(
        "plot_loss save_only_model save_safetensors no_save_optim no_save_rng "
        "finetune save_first_step include_tokens_per_second include_num_input_tokens_seen disable_tqdm",
        "checkpoints can always be resumed from, and loss.png is always written",
    ),
    **named(
        "eval_on_start eval_at_start eval_iters eval_table_size eval_max_new_tokens do_eval "
        "eval_causal_lm_metrics do_causal_lm_eval eval_use_evalscope eval_dataset_args eval_limit "
        "predict_with_generate compute_accuracy",
        "validation is every evaluation.every_steps, and infer scores answers",
    ),
    **named(
        "logging_dir logging_first_step logging_strategy log_level wandb_entity wandb_watch wandb_log_model "
        "wandb_run_id wandb_mode tensorboard_dir mlflow_tracking_uri swanlab_project swanlab_workspace "
        "swanlab_mode swanlab_run_name swanlab_description swanlab_log_model swanlab_log_completions "
        "swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_lark_webhook_url "
        "use_otel_metrics otel_metrics_host otel_metrics_port debug profiler_steps hub_model_id hub_strategy "
        "push_to_hub hf_use_auth_token hub_token",
        "trackers read their own environment variables, and merge and export push their results",
    ),
    **named(
        "model_type tokenizer_type processor_type model_class tokenizer_use_fast tokenizer_legacy "
        "tokenizer_config is_llama_derived_model is_mistral_derived_model is_falcon_derived_model "
        "is_qwen_derived_model cls_model_config base_model_config base_model_ignore_patterns "
        "tokenizer_use_mistral_common use_fast_tokenizer label_names strict lora_fan_in_fan_out "
        "use_onebitllms",
        "the model's own files tell its classes",
    ),
    **named(
        "pad_to_sequence_len pad_to_multiple_of dataloader_drop_last shuffle_merged_datasets "
        "eval_sample_packing batching_strategy pretrain_multipack_attn streaming_multipack_buffer_size "
        "shuffle_buffer_size skip_prepare_dataset resize_token_embeddings_to_32x",
        "a pass holds no padding, and every row of an epoch is used once, in an order drawn with the seed",
    ),
    **named(
        "loss_watchdog_threshold loss_watchdog_patience",
        "a run whose loss is not finite, or explodes, stops by itself",
    ),
    **named(
        "infer_backend sample_backend max_new_tokens max_completion_length temperature top_p top_k min_p "
        "repetition_penalty stream do_predict do_sample num_beams load_data_args vllm vllm_maxlen "
        "vllm_enforce_eager image_max_pixels image_min_pixels video_max_pixels video_fps video_maxlen "
        "max_pixels merge_lora export_dir export_size export_device export_legacy_format export_hf_on_finish "
        "export_quantization_bit export_quantization_dataset save_vllm show_system",
        "no part of training; see infer, serve, merge and export",
    ),
}
"""Name in transformers, TRL, LLaMA-Factory, ms-swift, axolotl or unsloth → why loratune has no such setting."""
