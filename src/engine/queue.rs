//! Who waits, and how many calls are under way: the part of the coalescer that must be exactly
//! right under concurrency. It does no I/O and holds no lock of its own; the model checker runs
//! it through every interleaving (see the tests).

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

    /// Every interleaving of three buyers: each item travels exactly once, in no more calls at a
    /// time than allowed, and nobody is left waiting.
    #[test]
    fn nobody_is_left_waiting_in_any_interleaving() {
        for in_flight_max in [1, 2] {
            loom::model(move || {
                let queue = Arc::new(Mutex::new(Queue::new(8, in_flight_max)));
                let sent = Arc::new(Mutex::new(Vec::new()));
                let buyers: Vec<_> = (0..3)
                    .map(|item| {
                        let (queue, sent) = (Arc::clone(&queue), Arc::clone(&sent));
                        thread::spawn(move || {
                            if queue.lock().unwrap().push(item) != Pushed::Start {
                                return;
                            }
                            loop {
                                let batch = queue.lock().unwrap().take(|_| true);
                                let Some(batch) = batch else { break };
                                thread::yield_now();
                                sent.lock().unwrap().extend(batch);
                            }
                        })
                    })
                    .collect();
                for buyer in buyers {
                    buyer.join().unwrap();
                }
                let mut sent = sent.lock().unwrap().clone();
                sent.sort_unstable();
                assert_eq!(sent, [0, 1, 2]);
                let queue = queue.lock().unwrap();
                assert_eq!((queue.len(), queue.in_flight), (0, 0));
            });
        }
    }
}
