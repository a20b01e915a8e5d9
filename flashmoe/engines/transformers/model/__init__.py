"""A transformers model whose experts are not in it.

moe_modules         which of its modules are experts, and of what shapes
empty_model         the model of a configuration, with no weights
dense_weights       fills it with everything but experts
packed_linear       linear layers whose weights lie as oneDNN multiplies them
streamed_parameter  what stands in it for an expert's parameter
streamed_module     who computes for its experts modules
streamed_model      what libraries may do to it
"""
