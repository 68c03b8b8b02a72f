//! Keeps the watched sales of a partition up to date.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::{Fuse, FusedFuture, FutureExt, join_all};
use tokio::{
    sync::broadcast::{
        Receiver,
        error::{RecvError, TryRecvError},
    },
    time::sleep_until,
};

use super::{feeds::Feeds, pace};
use crate::{
    domain::id::RoundId,
    engine::{Engine, EngineError, Standing},
    metrics::RealtimeMetrics,
    store::directory::Directory,
};

/// The time between two looks at what the node itself has changed. News come with every call; to
/// wake up for each of them would make live stock cost more the more is sold.
const NEWS_REST: Duration = Duration::from_millis(10);

/// Samples and listens for ever, but only while something is watched.
pub(super) async fn run(
    engine: &Engine,
    feeds: &Feeds,
    directory: &Directory,
    metrics: &RealtimeMetrics,
) {
    loop {
        feeds.occupied().await;
        follow(engine, feeds, directory, metrics).await;
    }
}

/// Samples and listens until nobody watches any more.
async fn follow(engine: &Engine, feeds: &Feeds, directory: &Directory, metrics: &RealtimeMetrics) {
    // The round after one that is over; none as long as this node knows of none.
    let next = |sale, round| {
        let mut facts = directory.remembered(sale)?;
        while facts.round_id() <= round {
            facts = Arc::clone(facts.next.as_ref()?);
        }
        Some(facts.round_id())
    };
    let mut news = engine.news();
    let mut sample_at = Instant::now();
    let mut rested_at = Instant::now();
    let mut interval = pace::FRAME_INTERVAL_MIN;
    let mut sampling = pin!(Fuse::terminated());
    loop {
        let now = Instant::now();
        let due = feeds.flush(now, interval).map(|due| due.max(rested_at));
        tokio::select! {
            standings = &mut sampling => {
                let now = Instant::now();
                feeds.offer(standings, now, interval);
                // The next round is to be seen at once.
                if feeds.turn(next) {
                    sample_at = now;
                }
            }
            () = sleep_until(sample_at.into()), if sampling.is_terminated() => {
                feeds.turn(next);
                let rounds = feeds.rounds();
                if rounds.is_empty() {
                    return;
                }
                interval = pace::interval(rounds.len(), metrics.open_streams());
                sample_at = (sample_at + interval).max(Instant::now());
                sampling.set(sample(engine, rounds, metrics).fuse());
            }
            standings = hear(&mut news, rested_at) => {
                rested_at = Instant::now() + NEWS_REST;
                feeds.offer(standings, Instant::now(), interval);
            }
            () = sleep_until(due.unwrap_or(now).into()), if due.is_some() => {
                rested_at = Instant::now() + NEWS_REST;
            }
        }
    }
}

/// Reads the rounds; what cannot be read is left out: the next sample may bring it.
async fn sample(engine: &Engine, rounds: Vec<RoundId>, metrics: &RealtimeMetrics) -> Vec<Standing> {
    let reads = rounds.into_iter().map(async |round| {
        let read: Result<_, EngineError> = engine.snapshot(round).await;
        read.inspect_err(|error| {
            metrics.failed_samples.inc();
            tracing::debug!(%round, %error, "live stock: round not read");
        })
        .ok()
    });
    join_all(reads).await.into_iter().flatten().collect()
}

/// What this node's own calls have brought, once it has rested.
async fn hear(news: &mut Receiver<Standing>, rested_at: Instant) -> Vec<Standing> {
    sleep_until(rested_at.into()).await;
    let mut standings = match news.recv().await {
        Ok(standing) => vec![standing],
        // Too many to listen to: the rest is still there, and the next sample has what is not.
        Err(RecvError::Lagged(_)) => Vec::new(),
        // The engine has gone, and with it everything that could be heard.
        Err(RecvError::Closed) => std::future::pending().await,
    };
    loop {
        match news.try_recv() {
            Ok(standing) => standings.push(standing),
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => return standings,
        }
    }
}
