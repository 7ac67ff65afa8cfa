#!/usr/bin/env bash
# Writes the Teacher's requests beside the rationales that RL exported. All arguments go to the .py of the same name:
#   bash preprocessing_after_RL/processing_sentence_level_feedback.sh --problems scienceqa --data_root data
#   bash preprocessing_after_RL/processing_sentence_level_feedback.sh --questions_dir RL_models/<run>/questions
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/processing_sentence_level_feedback.py" "$@"
