//! Lets what waits at the same time travel in one call.
//!
//! No timer and no added delay: a call takes whatever arrived while the last ones were under way.
//! Order is decided inside Redis, so several calls may be under way at once.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::oneshot, task::yield_now};

use super::{
    error::EngineError,
    queue::{Pushed, Queue},
};

/// A kind of call that can carry many items.
pub(super) trait Lane: Send + Sync + 'static {
    /// What one caller wants.
    type Item: Send + 'static;
    /// What one caller gets.
    type Answer: Send + 'static;
    /// What of a call's room the items so far have taken.
    type Room: Default;

    /// Whether an item has room in a call; if so, takes it.
    fn fits(room: &mut Self::Room, item: &Self::Item) -> bool;

    /// Makes the call: one answer for each item, in their order.
    fn call(
        &self,
        items: Vec<Self::Item>,
    ) -> impl Future<Output = Result<Vec<Self::Answer>, EngineError>> + Send;
}

struct Waiter<L: Lane> {
    item: L::Item,
    answer: oneshot::Sender<Result<L::Answer, EngineError>>,
}

/// The queue in front of a lane.
pub(super) struct Coalescer<L: Lane> {
    lane: L,
    capacity: usize,
    queue: Mutex<Queue<Waiter<L>>>,
}

impl<L: Lane> fmt::Debug for Coalescer<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coalescer")
            .field("waiting", &self.queue().len())
            .finish_non_exhaustive()
    }
}

impl<L: Lane> Coalescer<L> {
    pub(super) fn new(lane: L, capacity: usize, in_flight_max: usize) -> Arc<Self> {
        Arc::new(Self {
            lane,
            capacity,
            queue: Mutex::new(Queue::new(capacity, in_flight_max)),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue<Waiter<L>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Items that wait for a call.
    pub(super) fn waiting(&self) -> usize {
        self.queue().len()
    }

    /// The lane behind the queue.
    pub(super) fn lane(&self) -> &L {
        &self.lane
    }

    /// Waits for a call that carries the item, and for its answer.
    ///
    /// Dropping the future before the item was sent takes it back; after that it has no effect.
    pub(super) async fn submit(self: &Arc<Self>, item: L::Item) -> Result<L::Answer, EngineError> {
        let (answer, answered) = oneshot::channel();
        let pushed = self.queue().push(Waiter { item, answer });
        match pushed {
            Pushed::Full => return Err(EngineError::Overloaded(self.capacity)),
            Pushed::Queued => {}
            Pushed::Start => {
                tokio::spawn(Arc::clone(self).run());
            }
        }
        // The sender is dropped unused only when the process goes down around us.
        answered
            .await
            .unwrap_or_else(|_| Err(EngineError::Unknown("shutting down".to_owned())))
    }

    fn next_batch(&self) -> Option<Vec<Waiter<L>>> {
        let mut room = L::Room::default();
        // Who has gone takes no room: the item is dropped before it is sent.
        self.queue()
            .take(|waiter| waiter.answer.is_closed() || L::fits(&mut room, &waiter.item))
    }

    /// One turn: calls until nothing waits.
    async fn run(self: Arc<Self>) {
        let turn = Turn(&self);
        loop {
            // Whoever is ready to buy at this instant comes along: without this the call would be
            // made by the one who starts it before the runtime has heard the others.
            yield_now().await;
            let Some(batch) = self.next_batch() else {
                break;
            };
            let (items, answers): (Vec<_>, Vec<_>) = batch
                .into_iter()
                .filter(|waiter| !waiter.answer.is_closed())
                .map(|waiter| (waiter.item, waiter.answer))
                .unzip();
            if items.is_empty() {
                continue;
            }
            match self.lane.call(items).await {
                Ok(results) => {
                    for (answer, result) in answers.into_iter().zip(results) {
                        let _ = answer.send(Ok(result));
                    }
                }
                Err(error) => {
                    for answer in answers {
                        let _ = answer.send(Err(error.clone()));
                    }
                }
            }
        }
        std::mem::forget(turn);
    }
}

/// Gives a turn back when its task ends in another way than by having nothing to do.
struct Turn<'a, L: Lane>(&'a Coalescer<L>);

impl<L: Lane> Drop for Turn<'_, L> {
    fn drop(&mut self) {
        self.0.queue().abandon();
    }
}
