"""RL with sentence rewards: sampling, rewards, advantages, PPO."""
