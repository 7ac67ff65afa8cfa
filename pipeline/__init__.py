"""The pipeline of run_ares.py: its configuration, its stages, their cost beforehand."""
