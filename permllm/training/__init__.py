"""What learns by descent through the model: its linears under masks, and what all of it shares."""
