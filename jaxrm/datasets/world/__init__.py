"""The categories of the synthetic world.

Each category is one module with the same four functions and a table of weights:

- `ask(rng)` returns the messages of a prompt;
- `read(text)` returns the task that the prompt's text states, or None if it states no such task;
- `answer(task, writer)` writes a candidate with the writer's flaws;
- `judge(task, response)` returns every quality of a response, a number from 0 to 1.

What a prompt asks for colours several of its words, and so does what an answer gives: a small model
can learn to compare the two. The words of an answer alone tell its manners, doubts and length, and
whether it gives what most prompts of its category ask for, not whether its own prompt asks for it.
"""
