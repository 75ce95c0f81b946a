"""Rollout side: watch, fetch, prove, serve, sample, evaluate, replay."""
