//! Who waits, and how many calls are under way: the part of the coalescer that must be exactly
//! right under concurrency. It does no I/O and holds no lock of its own; the model checker runs
//! it through interleavings (see the tests).

use std::collections::VecDeque;

/// A bounded queue whose waiters travel in at most `in_flight_max` calls at a time.
#[derive(Debug)]
pub(super) struct Queue<T> {
    waiting: VecDeque<T>,
    capacity: usize,
    in_flight: usize,
    in_flight_max: usize,
}

/// What to do after [`Queue::push`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// Start a call: it will take the item with whatever else waits by then.
    Start,
    /// Nothing: a call under way will take the item when it is back.
    Queued,
    /// The queue is full; the item was not taken.
    Full,
}

impl<T> Queue<T> {
    pub(super) fn new(capacity: usize, in_flight_max: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            capacity,
            in_flight: 0,
            in_flight_max,
        }
    }

    /// Adds an item. Whoever is told [`Pushed::Start`] must call [`Queue::take`] until it gives
    /// nothing more.
    pub(super) fn push(&mut self, item: T) -> Pushed {
        if self.waiting.len() >= self.capacity {
            return Pushed::Full;
        }
        self.waiting.push_back(item);
        if self.in_flight == self.in_flight_max {
            return Pushed::Queued;
        }
        self.in_flight += 1;
        Pushed::Start
    }

    /// Takes the next batch in order: items while `fits` says so. When nothing waits the caller's
    /// turn is over.
    pub(super) fn take(&mut self, mut fits: impl FnMut(&T) -> bool) -> Option<Vec<T>> {
        let mut batch = Vec::new();
        while self.waiting.front().is_some_and(&mut fits) {
            batch.extend(self.waiting.pop_front());
        }
        // Something that fits in no call would make its turn spin for ever.
        if batch.is_empty() {
            batch.extend(self.waiting.pop_front());
        }
        if batch.is_empty() {
            self.in_flight -= 1;
            return None;
        }
        Some(batch)
    }

    /// Ends a turn that did not end by itself.
    pub(super) fn abandon(&mut self) {
        self.in_flight -= 1;
    }

    /// Items that wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use loom::{
        sync::{Arc, Mutex},
        thread,
    };

    use super::*;

    #[test]
    fn a_full_queue_takes_nothing() {
        let mut queue = Queue::new(1, 1);
        assert_eq!(queue.push('a'), Pushed::Start);
        assert_eq!(queue.push('b'), Pushed::Full);
        assert_eq!(queue.take(|_| true), Some(vec!['a']));
        assert_eq!(queue.take(|_| true), None);
        assert_eq!(queue.push('c'), Pushed::Start);
    }

    #[test]
    fn an_item_too_big_for_any_call_travels_alone() {
        let mut queue = Queue::new(8, 1);
        assert_eq!(queue.push('a'), Pushed::Start);
        assert_eq!(queue.push('b'), Pushed::Queued);
        assert_eq!(queue.take(|_| false), Some(vec!['a']));
    }

    /// In every interleaving of some buyers each item travels exactly once, and nobody is left
    /// waiting.
    fn explore(buyers: usize, in_flight_max: usize, preemptions_max: Option<usize>) {
        let mut explorer = loom::model::Builder::new();
        explorer.preemption_bound = preemptions_max;
        explorer.check(move || {
            let queue = Arc::new(Mutex::new(Queue::new(8, in_flight_max)));
            let sent = Arc::new(Mutex::new(Vec::new()));
            let threads: Vec<_> = (0..buyers)
                .map(|item| {
                    let (queue, sent) = (Arc::clone(&queue), Arc::clone(&sent));
                    thread::spawn(move || {
                        if queue.lock().unwrap().push(item) != Pushed::Start {
                            return;
                        }
                        loop {
                            let batch = queue.lock().unwrap().take(|_| true);
                            let Some(batch) = batch else { break };
                            sent.lock().unwrap().extend(batch);
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            let mut sent = sent.lock().unwrap().clone();
            sent.sort_unstable();
            assert_eq!(sent, (0..buyers).collect::<Vec<_>>());
            let queue = queue.lock().unwrap();
            assert_eq!((queue.len(), queue.in_flight), (0, 0));
        });
    }

    #[test]
    fn nobody_is_left_waiting_in_any_interleaving_of_two() {
        explore(2, 1, None);
        explore(2, 2, None);
    }

    #[test]
    fn nobody_is_left_waiting_of_three_with_few_preemptions() {
        explore(3, 1, Some(2));
        explore(3, 2, Some(2));
    }
}
