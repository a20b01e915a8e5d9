"""What computes a layer's experts, whose weights arrive one expert after the other.

streamed_experts   in the place of a module's forward: fetches weights, and computes
mixture            the weighted sum of the experts' outputs, in transformers' order
expert_arithmetic  one expert
precision          in which dtypes the family computes
gradients          of the module's inputs
lookahead          which experts the next layer will probably need
"""
