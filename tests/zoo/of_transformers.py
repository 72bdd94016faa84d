"""Architectures as Hugging Face's transformers builds them, small and with random weights.

``make published`` installs that package and runs them; nothing is downloaded but it.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import of_torchvision
from entry import Entry

from tqexport import InputInfo

os.environ["HF_HUB_OFFLINE"] = "1"

PIXELS, SPEECH = (InputInfo("pixel_values", (3, 32, 32)),), (InputInfo("input_values", (400,)),)
LARGER = (InputInfo("pixel_values", (3, 64, 64)),)
TOKENS = (InputInfo("input_ids", (16,), "int64", below=50),)
MASKED = (*TOKENS, InputInfo("attention_mask", (16,), "int64", below=2))
FILM, PAST = (InputInfo("pixel_values", (4, 3, 32, 32)),), (InputInfo("past_values", (32, 3)),)
MEL, FRAMES = (InputInfo("input_features", (16, 32)),), (InputInfo("input_values", (32, 16)),)

BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {**BODY, "image_size": 32, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
LANGUAGE = {**BODY, "vocab_size": 50}


def build(name: str, head: str, **options: Any) -> Any:
    """A network with random weights."""
    of_torchvision.models()  # which transformers imports
    import transformers

    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}{head}")(config)


def entry(title: str, inputs: tuple[InputInfo, ...], name: str, head: str, options: Any, **expected: str) -> Entry:
    return Entry(title, partial(build, name, head, **options), inputs, **expected)


def picture(title: str, name: str, options: Any, inputs: tuple[InputInfo, ...] = PIXELS, **expected: str) -> Entry:
    return entry(title, inputs, name, "ForImageClassification", options, **expected)


def text(title: str, name: str, options: Any) -> Entry:
    return entry(title, MASKED, name, "ForSequenceClassification", options)


WHISPER = {
    **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_layers": 1},
    **{"decoder_attention_heads": 2, "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 16},
    **{"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
WAV2VEC2 = {
    **{**LANGUAGE, "conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)},
    **{"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    "classifier_proj_size": 16,
}
BIT = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "num_groups": 4}
BART = {
    **{"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32},
    "use_cache": False,
}
PYRAMID = {**STAGES, "num_attention_heads": [1, 2, 2, 3], "decoder_hidden_size": 16}
MOBILE = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "num_attention_heads": 2}
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
HIERA = {
    **{"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "patch_stride": [4, 4]},
    **{"masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1},
}
CAUSAL = {**LANGUAGE, "use_cache": False}
GROUPED = {**CAUSAL, "num_key_value_heads": 1}  # heads of queries share one of keys and values
NUMBERED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SERIES = {"context_length": 32, "num_input_channels": 3, "patch_length": 8, "patch_stride": 8, "d_model": 16}
SEGMENT = {
    **{**BODY, "output_channels": 16, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]},
    **{"mlp_dim": 64, "num_pos_feats": 8},
}
DEPTH = {
    **{**PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]},
    **{"fusion_hidden_size": 8, "readout_type": "ignore"},
}
STATES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "use_cache": False}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
OPT = {**LANGUAGE, "ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32, "use_cache": False}
ENTRIES = [
    picture("ResNet", "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    picture("BiT", "Bit", BIT, tflite="computes another weight from its own"),
    picture("RegNet", "RegNet", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}),
    picture("MobileNetV1", "MobileNetV1", {"image_size": 32, "depth_multiplier": 0.25}),
    picture("MobileNetV2", "MobileNetV2", {"image_size": 32, "depth_multiplier": 0.25}),
    picture("EfficientNet", "EfficientNet", {
        **{"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    }),
    picture("ConvNeXt", "ConvNext", {**STAGES, "patch_size": 2}),
    picture("ConvNeXt V2", "ConvNextV2", {**STAGES, "patch_size": 2}),
    picture("PoolFormer", "PoolFormer", STAGES),
    picture("ViT", "ViT", PATCHES),
    picture("DeiT", "DeiT", PATCHES),
    picture("BEiT", "Beit", PATCHES),
    picture("DINOv2", "Dinov2", {**PATCHES, "mlp_ratio": 2}),
    picture("ViT, as many patches as channels", "ViT", {**PATCHES, "hidden_size": 16, "intermediate_size": 16}),
    picture("Data2Vec", "Data2VecVision", PATCHES),
    picture("Swin", "Swin", WINDOWS),
    picture("Swin, as many places as channels", "Swin", {**WINDOWS, "embed_dim": 16}),
    picture("Swin V2", "Swinv2", WINDOWS),
    picture("SegFormer", "Segformer", PYRAMID),
    entry("SegFormer, masks", PIXELS, "Segformer", "ForSemanticSegmentation", PYRAMID),
    picture("MobileViT", "MobileViT", {**MOBILE, "image_size": 32}),
    picture("MobileViT V2", "MobileViTV2", {"image_size": 64, "width_multiplier": 0.25}, LARGER),
    picture("LeViT", "Levit", {**LEVIT, "image_size": 64}, LARGER),
    picture("CvT", "Cvt", {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}),
    picture("PVT", "Pvt", {**PYRAMID, "image_size": 32}),
    picture("FocalNet", "FocalNet", {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "patch_size": 4}),
    picture("Hiera", "Hiera", HIERA),
    picture("SwiftFormer", "SwiftFormer", {"image_size": 32, "embed_dims": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}),
    picture("CLIP, pictures", "CLIP", {"vision_config": PATCHES, "text_config": LANGUAGE}),
    picture("SigLIP, pictures", "Siglip", {"vision_config": PATCHES, "text_config": LANGUAGE}),
    picture("DINOv2 with registers", "Dinov2WithRegisters", {**PATCHES, "mlp_ratio": 2}),
    entry("DINOv3", PIXELS, "DINOv3ViT", "Model", PATCHES),
    picture("TextNet", "TextNet", {"image_size": [32, 32]}),
    entry("YOLOS", PIXELS, "Yolos", "ForObjectDetection", {
        **{**PATCHES, "image_size": [32, 32], "num_detection_tokens": 4},
    }),
    entry("GLPN, depth", PIXELS, "GLPN", "ForDepthEstimation", {**PYRAMID, "decoder_hidden_size": 8}),
    entry("DPT, depth", PIXELS, "DPT", "ForDepthEstimation", DEPTH),
    entry("Segment Anything, encoder", LARGER, "SamVision", "Model", SEGMENT),
    entry("VideoMAE", FILM, "VideoMAE", "ForVideoClassification", {**PATCHES, "num_frames": 4}),
    entry("TimeSformer", FILM, "Timesformer", "ForVideoClassification", {**PATCHES, "num_frames": 4}),
    text("BERT", "Bert", LANGUAGE),
    text("DistilBERT", "DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 50}),
    text("RoBERTa", "Roberta", {**LANGUAGE, "max_position_embeddings": 40}),
    text("BERT, as many tokens as channels", "Bert", {**LANGUAGE, "hidden_size": 16}),
    text("ALBERT", "Albert", {**LANGUAGE, "embedding_size": 16}),
    text("ELECTRA", "Electra", {**LANGUAGE, "embedding_size": 16}),
    text("MPNet", "MPNet", LANGUAGE),
    text("DeBERTa V2", "DebertaV2", LANGUAGE),
    text("SqueezeBERT", "SqueezeBert", {**LANGUAGE, "embedding_size": 32}),
    text("MobileBERT", "MobileBert", {**LANGUAGE, "embedding_size": 32, "intra_bottleneck_size": 32}),
    text("ConvBERT", "ConvBert", {**LANGUAGE, "embedding_size": 32}),
    text("XLM-R", "XLMRoberta", {**LANGUAGE, "max_position_embeddings": 40}),
    text("DeBERTa", "Deberta", {**LANGUAGE, "max_position_embeddings": 32}),
    text("ModernBERT", "ModernBert", {**LANGUAGE, **NUMBERED, "cls_token_id": 1, "sep_token_id": 2}),
    entry("FNet", TOKENS, "FNet", "ForSequenceClassification", LANGUAGE),
    entry("RemBERT", TOKENS, "RemBert", "ForSequenceClassification", {
        **{**LANGUAGE, "input_embedding_size": 16, "output_embedding_size": 16},
    }),
    entry("XLNet", TOKENS, "XLNet", "ForSequenceClassification", {
        **{"vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "use_mems_eval": False},
    }),
    entry("BART", TOKENS, "Bart", "Model", BART),
    entry("Falcon", TOKENS, "Falcon", "ForCausalLM", {**CAUSAL, "num_attention_heads": 2}),
    entry("T5, encoder", TOKENS, "T5", "EncoderModel", T5),
    entry("GPT-2", TOKENS, "GPT2", "LMHeadModel", {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "use_cache": False,
    }),
    entry("OPT", TOKENS, "OPT", "ForCausalLM", OPT),
    entry("GPT-NeoX", TOKENS, "GPTNeoX", "ForCausalLM", CAUSAL),
    entry("Qwen 2", TOKENS, "Qwen2", "ForCausalLM", GROUPED),
    entry("Qwen 3", TOKENS, "Qwen3", "ForCausalLM", {**GROUPED, "head_dim": 16}),
    entry("Gemma", TOKENS, "Gemma", "ForCausalLM", {**GROUPED, "head_dim": 16, "pad_token_id": 0}),
    entry("Phi", TOKENS, "Phi", "ForCausalLM", CAUSAL),
    entry("Mistral", TOKENS, "Mistral", "ForCausalLM", {**GROUPED, "sliding_window": 8}),
    entry("SmolLM 3", TOKENS, "SmolLM3", "ForCausalLM", {**GROUPED, **NUMBERED}),
    entry("OLMo 2", TOKENS, "Olmo2", "ForCausalLM", {**CAUSAL, "pad_token_id": 0, "eos_token_id": 2}),
    entry("StableLM", TOKENS, "StableLm", "ForCausalLM", GROUPED),
    entry("LFM 2", TOKENS, "Lfm2", "ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention"]}),
    entry("Bloom", TOKENS, "Bloom", "ForCausalLM", {
        **{"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2, "use_cache": False},
    }),
    entry("Mamba", TOKENS, "Mamba", "ForCausalLM", STATES),
    entry("Mamba 2", TOKENS, "Mamba2", "ForCausalLM", {
        **{**STATES, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    }),
    entry("RWKV", TOKENS, "Rwkv", "ForCausalLM", {
        **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        **{"context_length": 32, "use_cache": False},
    }),
    entry("Llama", TOKENS, "Llama", "ForCausalLM", GROUPED),
    entry("Whisper, encoder", MEL, "Whisper", "ForAudioClassification", WHISPER),
    entry("wav2vec 2.0", SPEECH, "Wav2Vec2", "ForSequenceClassification", WAV2VEC2),
    entry("wav2vec 2.0 Conformer", SPEECH, "Wav2Vec2Conformer", "ForSequenceClassification", {
        **{**WAV2VEC2, "conv_depthwise_kernel_size": 5},
    }),
    entry("WavLM", SPEECH, "WavLM", "ForSequenceClassification", WAV2VEC2),
    entry("SEW", SPEECH, "SEW", "ForSequenceClassification", {**WAV2VEC2, "squeeze_factor": 2}),
    entry("Data2Vec, audio", SPEECH, "Data2VecAudio", "ForSequenceClassification", {
        **{**WAV2VEC2, "num_conv_pos_embeddings": 4},
    }),
    entry("HuBERT", SPEECH, "Hubert", "ForSequenceClassification", WAV2VEC2),
    entry("Audio Spectrogram Transformer", FRAMES, "AST", "ForAudioClassification", {
        **{**BODY, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    }),
    entry("PatchTST", PAST, "PatchTST", "ForPrediction", {
        **{**SERIES, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2, "prediction_length": 8},
    }),
    entry("PatchTSMixer", PAST, "PatchTSMixer", "ForPrediction", {**SERIES, "num_layers": 2, "prediction_length": 8}),
]  # fmt: skip
