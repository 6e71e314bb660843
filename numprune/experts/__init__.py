"""Routed experts: what each reads and puts out, what a layer loses without some, and the fit of those that stay.

Notation for shapes: T tokens, E experts, k of them for each token, H the hidden size, I the channels of an expert. Of
the layer's output sum_e p_e(x) (W_e a_e(x) + b_e), p_e(x) is the routing weight, zero where the token does not go to e,
a_e(x) are the expert's inner values, W_e is its part of the down projection. It is linear in all W_e and b_e together:
an expert's inputs are x_e = p_e a_e, with p_e behind them where there are biases.
"""
