"""Parts of `DynamicFusionDecoder`: the fused model, its decoding and its loading."""
