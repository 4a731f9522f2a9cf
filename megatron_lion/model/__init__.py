"""GPT-2 and BERT through Megatron-Core, with one forward-step signature."""
