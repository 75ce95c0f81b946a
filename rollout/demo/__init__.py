"""The main job on one machine: a trainer, a rollout node, a frozen control and a replay, as separate processes."""
