"""Parts of `GLDFusionModule`: the criterion, and the sources."""
