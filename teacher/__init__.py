"""The Teacher: requests, replies, money, and the question folders through which RL talks to it."""
