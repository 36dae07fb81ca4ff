"""Mixture-of-experts layers whose communication is co-scheduled with the experts (FSMoE, arXiv 2501.10714)."""
