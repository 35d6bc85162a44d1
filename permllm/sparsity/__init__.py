"""What the dense model tells: statistics of its linears' inputs, saliency, the target of learning; kept between jobs."""
