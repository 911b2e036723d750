"""The table of engines: name -> "module:class". A new engine is one file here, one line below, one line in tests/cases.py."""

TABLE = {
    "backprop": "altgrad.engines.backprop:Backprop",
    "forward": "altgrad.engines.forward:Forward",
    "likelihood-ratio": "altgrad.engines.likelihood_ratio:LikelihoodRatio",
    "es": "altgrad.engines.evolution:ES",
    "eggroll": "altgrad.engines.evolution:Eggroll",
    "spsa": "altgrad.engines.evolution:SPSA",
    "random-subspace": "altgrad.engines.subspace:RandomSubspace",
    "ask-tell": "altgrad.engines.ask_tell:AskTell",
    "local": "altgrad.engines.local:Local",
    "deep-supervision": "altgrad.engines.deep_supervision:DeepSupervision",
    "mono-forward": "altgrad.engines.mono_forward:MonoForward",
    "predsim": "altgrad.engines.predsim:PredSim",
    "forward-forward": "altgrad.engines.forward_forward:ForwardForward",
    "feedback-alignment": "altgrad.engines.feedback_alignment:FeedbackAlignment",
    "direct-feedback-alignment": "altgrad.engines.direct_feedback_alignment:DirectFeedbackAlignment",
    "equilibrium": "altgrad.engines.equilibrium:Equilibrium",
    "implicit": "altgrad.engines.implicit:Implicit",
    "straight-through": "altgrad.engines.straight_through:StraightThrough",
    "mixed": "altgrad.engines.mixed:Mixed",
}
