"""Tiny models of further families, for ``python -m bench.coverage --more``: spellings that the 27 do not have.

Falcon (one key head, ALiBi), BLOOM (baddbmm, ALiBi over merged heads), GPT-Neo (two masks that add up), XGLM (clamped
scores), OpenAI GPT (scores blended with a number), XLNet (einsum, a mask that is subtracted), DeBERTa (disentangled
attention), Swin and Swin 2 (windows, cosine attention), ViTDet (positions of rows and columns), NanoChat (rope turned
the other way), Granite SWA (a sink scales the output), encoder-decoder models, and the many relatives of Llama.
"""

from __future__ import annotations

from typing import Any

from bench.families import DEEPSEEK, EXPERTS, GPT2, IMAGE, Family, text

_FALCON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_NO_LATENTS = {key: value for key, value in DEEPSEEK.items() if "lora" not in key}
_LATENTS = {key: DEEPSEEK[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
                                           "v_head_dim", "num_key_value_heads")}  # fmt: skip
_BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
       "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_EAGER = ("eager",)


def _other(name: str, model: str, config: str | None = None, eager: bool = False, **settings: Any) -> Family:
    """A family whose settings have names of their own."""
    return Family(name, config or name, model, settings, implementations=_EAGER if eager else ("eager", "sdpa"))


def _image(name: str, model: str, eager: bool = False, **settings: Any) -> Family:
    implementations = _EAGER if eager else ("eager", "sdpa")
    return Family(name, name, model, settings, image=True, implementations=implementations)


def _pair(name: str, model: str, eager: bool = False, **settings: Any) -> Family:
    """An encoder and a decoder."""
    implementations = _EAGER if eager else ("eager", "sdpa")
    return Family(name, name, model, settings, decoder=True, implementations=implementations)


OTHERS: tuple[Family, ...] = (
    # language models
    text("glm", "GlmForCausalLM", head_dim=16),
    text("glm4", "Glm4ForCausalLM", head_dim=16),
    _other("falcon", "FalconForCausalLM", multi_query=True, parallel_attn=True, **_FALCON),
    _other("falcon-new", "FalconForCausalLM", "falcon", num_kv_heads=2, new_decoder_architecture=True, **_FALCON),
    _other("falcon-alibi", "FalconForCausalLM", "falcon", multi_query=False, parallel_attn=False, alibi=True,
           **_FALCON),
    _other("bloom", "BloomForCausalLM", eager=True, vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    _other("mpt", "MptForCausalLM", eager=True, vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=128,
           expansion_ratio=2),
    text("stablelm", "StableLmForCausalLM"),
    text("starcoder2", "Starcoder2ForCausalLM", sliding_window=8),
    text("phi", "PhiForCausalLM"),
    text("nemotron", "NemotronForCausalLM"),
    text("gemma", "GemmaForCausalLM", head_dim=16),
    text("cohere", "CohereForCausalLM", use_qk_norm=True),
    text("olmo", "OlmoForCausalLM", clip_qkv=8.0),
    text("olmo3", "Olmo3ForCausalLM", sliding_window=8),
    text("exaone4", "Exaone4ForCausalLM", sliding_window=8, sliding_window_pattern=2),
    text("ernie4_5", "Ernie4_5ForCausalLM"),
    text("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", head_dim=16),
    text("seed_oss", "SeedOssForCausalLM", head_dim=16),
    text("arcee", "ArceeForCausalLM"),
    text("helium", "HeliumForCausalLM", head_dim=16),
    text("persimmon", "PersimmonForCausalLM"),
    _other("gpt_neo", "GPTNeoForCausalLM", eager=True, vocab_size=128, hidden_size=64, num_layers=2, num_heads=4,
           max_position_embeddings=128, window_size=8, attention_types=[[["global", "local"], 1]], bos_token_id=1,
           eos_token_id=2),
    _other("gpt_bigcode", "GPTBigCodeForCausalLM", **GPT2, bos_token_id=1, eos_token_id=2),
    text("biogpt", "BioGptForCausalLM"),
    _other("xglm", "XGLMForCausalLM", eager=True, vocab_size=128, d_model=64, ffn_dim=96, num_layers=2,
           attention_heads=4, max_position_embeddings=128),
    text("gpt_neox_japanese", "GPTNeoXJapaneseModel", only_eager=True),
    text("granite_swa", "GraniteSWAForCausalLM", only_eager=True),
    text("ministral", "MinistralForCausalLM", sliding_window=8, head_dim=16),
    text("bitnet", "BitNetForCausalLM"),
    text("apertus", "ApertusForCausalLM"),
    text("nanochat", "NanoChatForCausalLM"),
    text("cwm", "CwmForCausalLM", sliding_window=8),
    text("jais2", "Jais2ForCausalLM"),
    text("youtu", "YoutuForCausalLM", **_LATENTS),
    text("minicpm3", "MiniCPM3ForCausalLM", **_LATENTS),
    text("vaultgemma", "VaultGemmaForCausalLM", head_dim=16, sliding_window=8, only_eager=True),
    # mixtures of experts
    text("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=48,
         moe_layer_start_index=1, moe_layer_interval=1, moe_num_shared_experts=1),
    text("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", head_dim=16, num_experts=4, moe_topk=2),
    text("granitemoe", "GraniteMoeForCausalLM", **EXPERTS),
    text("phimoe", "PhimoeForCausalLM", **EXPERTS),
    text("glm4_moe", "Glm4MoeForCausalLM", **{**EXPERTS, **_NO_LATENTS}),
    text("dots1", "Dots1ForCausalLM", **{**EXPERTS, **_NO_LATENTS}, layer_types=["full_attention"] * 2),
    text("exaone_moe", "ExaoneMoeForCausalLM", **EXPERTS),
    text("flex_olmo", "FlexOlmoForCausalLM", **EXPERTS),
    text("minimax_m2", "MiniMaxM2ForCausalLM", **EXPERTS, head_dim=16),
    text("solar_open", "SolarOpenForCausalLM", **EXPERTS, head_dim=16),
    # encoders
    text("distilbert", "DistilBertModel", dim=64, hidden_dim=96, n_layers=2, n_heads=4),
    text("albert", "AlbertModel", embedding_size=32),
    text("electra", "ElectraModel", embedding_size=32),
    text("deberta", "DebertaModel", only_eager=True, relative_attention=True, pos_att_type="c2p|p2c",
         position_buckets=8, max_relative_positions=16),
    text("deberta-v2", "DebertaV2Model", only_eager=True, relative_attention=True, pos_att_type="c2p|p2c",
         position_buckets=8, max_relative_positions=16, norm_rel_ebd="layer_norm", share_att_key=True),
    text("mpnet", "MPNetModel", only_eager=True),
    text("esm", "EsmModel", position_embedding_type="rotary", mask_token_id=5),
    text("nomic_bert", "NomicBertModel"),
    text("convbert", "ConvBertModel", only_eager=True, embedding_size=64, head_ratio=2),
    text("rembert", "RemBertModel", only_eager=True, input_embedding_size=32),
    text("eurobert", "EuroBertModel"),
    _other("xlnet", "XLNetModel", eager=True, vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=96),
    text("clip_text_model", "CLIPTextModel"),
    text("camembert", "CamembertModel"),
    text("ernie", "ErnieModel"),
    text("xlm-roberta", "XLMRobertaModel"),
    text("xlm-roberta-xl", "XLMRobertaXLModel"),
    text("data2vec-text", "Data2VecTextModel"),
    text("layoutlm", "LayoutLMModel"),
    text("markuplm", "MarkupLMModel", only_eager=True, max_depth=4, xpath_unit_hidden_size=8),
    text("megatron-bert", "MegatronBertModel", only_eager=True),
    text("roc_bert", "RoCBertModel", enable_pronunciation=False, enable_shape=False),
    text("splinter", "SplinterModel", only_eager=True),
    text("gte", "GteModel"),
    text("jina_embeddings_v3", "JinaEmbeddingsV3Model"),
    # images
    _image("deit", "DeiTModel", **IMAGE),
    _image("beit", "BeitModel", **IMAGE, use_relative_position_bias=True),
    _image("dinov3_vit", "DINOv3ViTModel", **IMAGE, use_gated_mlp=True),
    _image("ijepa", "IJepaModel", **IMAGE),
    _image("clip_vision_model", "CLIPVisionModel", **IMAGE),
    _image("dinov2_with_registers", "Dinov2WithRegistersModel", **IMAGE, mlp_ratio=2),
    _image("vit_msn", "ViTMSNModel", **IMAGE),
    _image("data2vec-vision", "Data2VecVisionModel", **IMAGE, use_relative_position_bias=True),
    _image("swin", "SwinModel", **_SWIN),
    _image("swinv2", "Swinv2Model", eager=True, **_SWIN),
    _image("vitdet", "VitDetModel", eager=True, **IMAGE, window_block_indices=[0], window_size=2,
           use_relative_position_embeddings=True),
    # encoder and decoder
    _pair("bart", "BartModel", **_BART),
    _pair("mbart", "MBartModel", **_BART),
    _pair("pegasus", "PegasusModel", **_BART),
    _pair("mvp", "MvpModel", eager=True, **_BART),
    _pair("plbart", "PLBartModel", **_BART),
    _pair("m2m_100", "M2M100Model", **_BART),
    _pair("marian", "MarianModel", **_BART),
    _pair("blenderbot", "BlenderbotModel", **_BART),
    _pair("t5", "T5Model", **_T5),
    _pair("mt5", "MT5Model", **_T5),
    _pair("umt5", "UMT5Model", **_T5),
)  # fmt: skip
