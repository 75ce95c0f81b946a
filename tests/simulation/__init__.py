"""Deterministic simulation of the store protocol: the product's own code, a seed, and a world that misbehaves.

    python -m tests.simulation --seeds 0..500              # from the repository's root; exit code 1 on a violation
    python -m tests.simulation --seed 17 --trace           # one seed, every step of it
    python -m tests.simulation --seeds 0..500 --bug NAME   # with a deliberate bug: it must be found

Trainers (`publisher.epochs`, `publisher.commit`), rollout agents (`rollout.agent`, `rollout.watch`, `shared.catalog`,
verified reads), collectors and operators (`publisher.collect`, `publisher.rollback`, fates, leases) run as greenlets on
one thread. Every call of the store is two points at which the scheduler may let another go on, stop an actor for
minutes or kill it: before the store acts, and before the caller hears of it. One `random.Random(seed)` makes all
choices, so a seed is a run. Clocks are simulated; the store has its own, and no two agree.

    scheduler.py    who goes on, what time it is, who is killed or stopped
    weather.py      what goes wrong in a seed, and how often
    sim_store.py    a strongly consistent store that fails in every way that the protocol allows
    adapters.py     adapters of two tensors
    trainers.py     lives of a trainer, each of several ranks        nodes.py      rollout nodes
    keepers.py      collectors and operators
    facts.py        what really happened, from every change of the bucket
    invariants.py   what must hold after every step
    stage.py        what all actors of a seed share                  world.py      one seed: chaos, then calm
    bugs.py         deliberate bugs, each to be found by the promise that it breaks; sabotage.py makes them
"""
