"""A tiny random model of any family of transformers, with windows and chunks shorter than the tests' prompts."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY = 259  # the tiny models' tokenizer writes one token a byte
WINDOW = 8

# What a config calls its sizes. Only names that the family's own config has are set.
SIZES = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "src_vocab_size": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "model_dim": 64,
    "embedding_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "d_ff": 128,
    "ffn_dim": 128,
    "dim_ff": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_kv": 16,
    "d_inner": 128,
    "n_inner": 128,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "n_layer": 4,
    "n_layers": 4,
    "num_encoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "global_head_dim": 16,
    "kv_channels": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "max_position_embeddings": 256,
    "max_target_positions": 256,
    "max_source_positions": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "context_length": 256,
    "max_encoder_position_embeddings": 256,
    "max_decoder_position_embeddings": 256,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "local_radius": WINDOW,
    "attention_window": WINDOW,
    "block_size": 4,
    "num_global_tokens": 4,
    "global_block_size": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "time_step_rank": 8,
    "lru_width": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "attention_hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_sliding_window": True,
}
# What a family needs beside its sizes, or what shows more of it: layers of every kind that it has.
_TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_STACK = {
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
    **{name: SIZES[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim", "sliding_window")},
    **_TURNS,
}
EXTRAS = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"], _MLA),
    "axk2": {**_MLA, "num_attention_heads": 4},
    "bailing_hybrid": {**_MLA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"n_ctx": 256},
    "ctrl": {"dff": 128},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "dots1": {"n_shared_experts": 1, "routed_scaling_factor": 1.0},
    "falcon": {"head_dim": None},
    "fsmt": {"langs": ["en", "de"], "scale_embedding": True},
    "gemma3_text": _TURNS,
    "gemma3n_text": {**_TURNS, "num_kv_shared_layers": 0, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kolibri1": _TURNS,
    "laguna": _TURNS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2},
    "longcat_flash": {**_MLA, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "marian": {"scale_embedding": True},
    "mbart": {"scale_embedding": True},
    "mellum": _TURNS,
    "ministral": _TURNS,
    "pegasus": {"scale_embedding": True},
    "prophetnet": {"num_hidden_layers": None},
    "qwen2": _TURNS,
    "qwen3": _TURNS,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "sarvam_mla": _MLA,
    "t5gemma": {"encoder": _STACK, "decoder": _STACK},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "zamba": {"attention_hidden_size": 128, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"attention_hidden_size": 128, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# Tokens that a family is forced to write.
FORCED = {"bart": {"forced_bos_token_id": 5, "forced_eos_token_id": 2}, "mbart": {"forced_bos_token_id": 7}}

OTHERS = frozenset(
    """
    audioflamingo3 blt dots3_note emu3 encoder-decoder fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
    gemma4_unified_assistant git glmasr got_ocr2 granite_speech granite_speech_plus llama4 mllama moshi
    moss_transcribe_diarize musicflamingo musicgen musicgen_melody nemo_speechlm omniasr phi4_multimodal qwen2_audio
    qwen3_5 qwen3_5_moe qwen3_asr qwen4_exp seamless_m4t seamless_m4t_v2 trocr vibevoice_asr voxtral voxtral_realtime
    whisper
    """.split()  # noqa: SIM905 - a list would take a line for each name
)
"""Entries of transformers' lists that are no text families by themselves; a checkpoint is checked all the same."""


def config_of(family, **changes):
    """Return the family's config in tiny sizes."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    sizes = {name: size for name, size in SIZES.items() if _has(default, name)}
    start = {"decoder_start_token_id": 1} if default.is_encoder_decoder else {}
    settings = {**sizes, **start, **EXTRAS.get(family, {}), **changes}
    return kind(**{name: value for name, value in settings.items() if value is not None})


def _has(config, name):
    try:
        return hasattr(config, name)
    except Exception:  # some configs keep such a number a layer, and raise where it is asked for as one
        return False


def model_of(family, **changes):
    """Return a random model of a family; the same numbers every time."""
    config = config_of(family, **changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():  # what starts at zero or one says nothing about its place
            if parameter.dim() < 2 and "norm" not in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    for name, token in FORCED.get(family, {}).items():
        setattr(model.generation_config, name, token)
    return model.eval()


def families():
    """Return every text family that transformers offers, decoder-only and encoder-decoder."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES} - {*OTHERS})
