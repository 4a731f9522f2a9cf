"""GPT-2 and BERT on Megatron-Core, with one forward-step signature."""
