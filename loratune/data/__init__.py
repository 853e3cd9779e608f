"""From files of questions and answers to token ids and labels."""
