"""The categories of the synthetic world.

Each category is one module with the same four functions and a table of weights:

- `ask(rng)` returns the messages of a prompt;
- `read(text)` returns the task that the prompt's text states, or None if it states no such task;
- `answer(task, rng, policy, clean)` writes a candidate, its content free of flaws if `clean`;
- `judge(task, response)` returns every quality of a response, a number from 0 to 1.
"""
