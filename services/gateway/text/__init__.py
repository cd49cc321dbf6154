"""Token ids to text: detokenizing, stop strings, log probabilities, one choice of an answer."""
