//! The event stream of one subscriber.

use std::{convert::Infallible, ops::RangeInclusive};

use bytes::Bytes;
use futures::stream;
use prometheus_client::metrics::gauge::Gauge;
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_stream::Stream;

use super::{
    board::Seat,
    feeds::Watching,
    frame::Piece,
    own::Look,
    page::{Cursor, Page},
};

use crate::metrics::RealtimeMetrics;

/// How long a client should wait before it connects again, milliseconds. Every client gets its
/// own, so that a crowd that is cut off together does not come back together.
const RETRY_MS: RangeInclusive<u32> = 2_000..=8_000;

/// What a subscriber looks at, for as long as it does.
#[derive(Debug)]
pub(super) enum View {
    /// One sale.
    Sale(Watching),
    /// All open sales.
    All(Seat),
    /// What is its own.
    Own(Box<Look>),
}

impl View {
    /// What is shown to everybody; otherwise the look at what is not.
    fn page(&mut self) -> Result<&mut watch::Receiver<Page>, &mut Look> {
        match self {
            Self::Sale(watching) => Ok(&mut watching.page),
            Self::All(seat) => Ok(&mut seat.page),
            Self::Own(look) => Err(look),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Beginning,
    Going,
    Over,
}

/// The event stream of one subscriber: a `retry:`, a snapshot, then every change that it is quick
/// enough for, and at last another `retry:` when the node stops. A personal one ends with why.
///
/// All that is its own is a place in the shared page: no task, no timer, no buffer.
#[derive(Debug)]
pub struct Events {
    view: View,
    cursor: Cursor,
    stage: Stage,
    subscribers: Gauge,
    _seat: OwnedSemaphorePermit,
}

impl Events {
    pub(super) fn new(
        mut view: View,
        seat: OwnedSemaphorePermit,
        metrics: &RealtimeMetrics,
    ) -> Self {
        metrics.subscribers.inc();
        let cursor = match view.page() {
            Ok(page) => page.borrow().start(),
            Err(_) => Cursor::default(),
        };
        Self {
            view,
            cursor,
            stage: Stage::Beginning,
            subscribers: metrics.subscribers.clone(),
            _seat: seat,
        }
    }

    /// The next piece of the stream; `None` when it is over.
    pub async fn next(&mut self) -> Option<Piece> {
        match self.stage {
            Stage::Beginning => {
                self.stage = Stage::Going;
                return Some(retry());
            }
            Stage::Going => {}
            Stage::Over => return None,
        }
        let page = match self.view.page() {
            Ok(page) => page,
            Err(look) => {
                // In a box, so that those who only watch stay small.
                let (piece, is_last) = Box::pin(look.next()).await;
                if is_last {
                    self.stage = Stage::Over;
                }
                return Some(piece);
            }
        };
        loop {
            if let Some(event) = page.borrow_and_update().next(&mut self.cursor) {
                return Some(event);
            }
            if page.changed().await.is_err() {
                self.stage = Stage::Over;
                return Some(retry());
            }
        }
    }

    /// The pieces without framing, as the body of an answer.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + use<> {
        stream::unfold(self, async |mut events| {
            let piece = events.next().await?;
            Some((Ok(piece.text()), events))
        })
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.subscribers.dec();
    }
}

fn retry() -> Piece {
    let ms = rand::rng().random_range(RETRY_MS);
    Piece::of(&format!("retry: {ms}\n\n"))
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use futures::FutureExt;
    use tokio::sync::Semaphore;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::realtime::{
        feeds::tests::feeds,
        frame::tests::{SALE, standing},
        pace::FRAME_INTERVAL_MIN as INTERVAL,
    };

    fn seat() -> OwnedSemaphorePermit {
        Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap()
    }

    fn retry_ms(piece: &Bytes) -> u32 {
        let text = std::str::from_utf8(piece).unwrap();
        let ms = text.strip_prefix("retry: ").unwrap().strip_suffix("\n\n");
        ms.unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn a_stream_begins_with_retry_and_snapshot_and_ends_with_the_last_value_and_retry() {
        let (feeds, metrics) = feeds();
        let watching = feeds.join(SALE, standing(1, 1, 0).round).unwrap();
        let now = Instant::now();
        feeds.offer([standing(1, 1, 0)], now, INTERVAL);
        let events = Events::new(View::Sale(watching), seat(), &metrics);
        assert_eq!(metrics.subscribers.get(), 1);
        let mut pieces = Box::pin(events.into_stream().map(Result::unwrap));
        let mut next = || pieces.next().now_or_never();
        assert!(RETRY_MS.contains(&retry_ms(&next().unwrap().unwrap())));
        assert!(next().unwrap().unwrap().starts_with(b"event: snapshot\n"));
        assert_eq!(next(), None, "nothing to say");
        feeds.beat();
        assert_eq!(next().unwrap().unwrap(), ":\n\n");
        feeds.offer([standing(1, 1, 1)], now + INTERVAL, INTERVAL);
        feeds.beat();
        assert!(next().unwrap().unwrap().starts_with(b"event: stock\n"));
        assert_eq!(next().unwrap().unwrap(), ":\n\n");
        // The node stops while the last value waits for its turn.
        feeds.offer([standing(1, 1, 10)], now + INTERVAL, INTERVAL);
        assert_eq!(next(), None);
        feeds.close(now + INTERVAL);
        let last = next().unwrap().unwrap();
        assert!(last.starts_with(b"event: state\n"), "{last:?}");
        assert!(RETRY_MS.contains(&retry_ms(&next().unwrap().unwrap())));
        assert_eq!(next(), Some(None), "over");
        drop(pieces);
        assert_eq!(metrics.subscribers.get(), 0);
    }

    #[tokio::test]
    async fn subscribers_share_the_bytes_of_a_frame() {
        let (feeds, metrics) = feeds();
        let round = standing(1, 1, 0).round;
        feeds.offer([standing(1, 1, 0)], Instant::now(), INTERVAL);
        let mut pieces = Vec::new();
        let mut streams = Vec::new();
        for _ in 0..2 {
            let watching = feeds.join(SALE, round).unwrap();
            feeds.offer([standing(1, 1, 0)], Instant::now(), INTERVAL);
            let mut events = Events::new(View::Sale(watching), seat(), &metrics);
            events.next().await;
            pieces.push(events.next().await.unwrap());
            streams.push(events);
        }
        assert_eq!(pieces[0].chunk().as_ptr(), pieces[1].chunk().as_ptr());
        assert_eq!(metrics.frames.get(), 1);
    }

    #[test]
    fn a_subscriber_is_small() {
        let (feeds, metrics) = feeds();
        let watching = feeds.join(SALE, standing(1, 1, 0).round).unwrap();
        let stream = Events::new(View::Sale(watching), seat(), &metrics).into_stream();
        assert!(size_of_val(&stream) <= 512, "{}", size_of_val(&stream));
    }
}
