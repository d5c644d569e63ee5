"""What happens between a request and its tokens: scheduling, the forward pass, sampling, and the thread that drives them."""
