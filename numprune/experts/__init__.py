"""Routed experts: their inputs and outputs, the loss from removing some, and the refit of the remaining ones.

Notation for shapes: T tokens, E experts, k experts per token, H the hidden size, I the channels of an expert. In the
layer's output sum_e p_e(x) (W_e a_e(x) + b_e), p_e(x) is the routing weight, zero if the token is not routed to e,
a_e(x) are the expert's inner values, and W_e is its part of the down projection. The output is linear in all W_e and
b_e: an expert's inputs are x_e = p_e a_e, followed by p_e if there are biases.
"""
