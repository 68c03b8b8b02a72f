//! Sends the plan: many connections, each taking the next purchase that is due.
//!
//! The model is open: when a purchase is sent never depends on how fast others were answered, and
//! its latency counts from the planned instant.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Uri};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::runtime;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::client::Connection;
use crate::crowd::Arrival;
use crate::outcome::{Next, Outcome, Setback, judge};
use crate::target::Target;

/// Connections that are being opened at once: fewer than a server's usual queue of new ones.
const OPENING_MAX: usize = 128;

/// The first and the longest pause before a purchase is tried again, unless the server asks for
/// a longer one.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How the crowd uses the network.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) target: Target,
    /// Kept-alive connections: how many requests can be in flight.
    pub(crate) connections: usize,
    /// Threads that drive them.
    pub(crate) threads: usize,
    /// Time for one answer; then the connection is dropped.
    pub(crate) timeout: Duration,
    /// How long a buyer tries, counted from the planned instant.
    pub(crate) patience: Duration,
    /// For the jitter between tries.
    pub(crate) seed: u64,
}

/// Everything that is sent, ready before the opening.
pub(crate) struct Sending {
    pub(crate) path: Uri,
    /// `Authorization` of each buyer.
    pub(crate) bearers: Vec<HeaderValue>,
    /// `Idempotency-Key` of each purchase.
    pub(crate) keys: Vec<HeaderValue>,
    pub(crate) body: Bytes,
    pub(crate) plan: Vec<Arrival>,
    /// When the sale opens: the instant from which the plan counts.
    pub(crate) opening: Instant,
}

impl Sending {
    /// The request of one purchase, the same at every try.
    pub(crate) fn request(&self, purchase: usize, host: &HeaderValue) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path.clone();
        let headers = request.headers_mut();
        headers.reserve(5);
        headers.insert(HOST, host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(
            AUTHORIZATION,
            self.bearers[self.plan[purchase].buyer].clone(),
        );
        headers.insert("idempotency-key", self.keys[purchase].clone());
        request
    }
}

/// What became of one purchase. All instants count from the opening.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    /// Position in the plan.
    pub(crate) purchase: usize,
    pub(crate) due: Duration,
    /// When the first request left, if one ever did.
    pub(crate) first_sent: Option<Duration>,
    /// When the last try began.
    pub(crate) last_sent: Duration,
    pub(crate) finished: Duration,
    /// Tries after the first.
    pub(crate) retries: u32,
    pub(crate) outcome: Outcome,
}

/// Counts that a progress bar can show while the crowd is at it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) accepted: AtomicUsize,
    pub(crate) refused: AtomicUsize,
    pub(crate) failed: AtomicUsize,
    pub(crate) retries: AtomicUsize,
}

impl Tally {
    /// Purchases that ended.
    pub(crate) fn ended(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
            + self.refused.load(Ordering::Relaxed)
            + self.failed.load(Ordering::Relaxed)
    }

    fn count(&self, outcome: &Outcome) {
        let counter = match outcome {
            Outcome::Accepted { .. } => &self.accepted,
            Outcome::Refused { .. } => &self.refused,
            Outcome::Failed { .. } | Outcome::Unknown { .. } => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A purchase that waits for its next try. Ordered by when that is due.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    purchase: usize,
    retries: u32,
    first_sent: Option<Instant>,
    /// When an answer was last lost.
    doubt: Option<Instant>,
}

/// The purchases that are not over, the most urgent on top.
struct Agenda(Mutex<BinaryHeap<Reverse<Waiting>>>);

impl Agenda {
    fn new(plan: &[Arrival], opening: Instant) -> Self {
        let waiting = plan.iter().enumerate().map(|(purchase, arrival)| {
            Reverse(Waiting {
                due: opening + arrival.due,
                purchase,
                retries: 0,
                first_sent: None,
                doubt: None,
            })
        });
        Self(Mutex::new(waiting.collect()))
    }

    fn take(&self) -> Option<Waiting> {
        let mut heap = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heap.pop().map(|Reverse(waiting)| waiting)
    }

    fn put(&self, waiting: Waiting) {
        let mut heap = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heap.push(Reverse(waiting));
    }
}

/// The work of one run, shared by all connections.
struct Work {
    load: Load,
    sending: Arc<Sending>,
    agenda: Agenda,
    tally: Arc<Tally>,
}

/// Connections that stand and wait for the plan.
pub(crate) struct Pool {
    load: Load,
    start: watch::Sender<Option<Arc<Work>>>,
    threads: Vec<oneshot::Receiver<Vec<Record>>>,
    /// Connections that could be opened.
    pub(crate) opened: usize,
}

impl Pool {
    /// Opens the connections.
    ///
    /// # Errors
    ///
    /// Not a single one could be opened.
    pub(crate) async fn open(load: Load) -> Result<Self> {
        let (start, started) = watch::channel(None);
        let (report, mut reports) = mpsc::channel(load.connections.max(1));
        let gate = Arc::new(Semaphore::new(OPENING_MAX));
        let mut threads = Vec::with_capacity(load.threads);
        for thread in 0..load.threads {
            let workers: Vec<Worker> = (thread..load.connections)
                .step_by(load.threads)
                .map(|n| Worker {
                    connection: None,
                    jitter: SmallRng::seed_from_u64(load.seed.wrapping_add(n as u64)),
                    records: Vec::new(),
                })
                .collect();
            let (finish, finished) = oneshot::channel();
            threads.push(finished);
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let (load, started) = (load.clone(), started.clone());
            let (report, gate) = (report.clone(), Arc::clone(&gate));
            thread::Builder::new()
                .name(format!("crowd-{thread}"))
                .spawn(move || {
                    let records = runtime.block_on(async {
                        let mut tasks = JoinSet::new();
                        for worker in workers {
                            let (load, started) = (load.clone(), started.clone());
                            let (report, gate) = (report.clone(), Arc::clone(&gate));
                            tasks.spawn(worker.stand(load, gate, report, started));
                        }
                        drop(report);
                        tasks.join_all().await.into_iter().flatten().collect()
                    });
                    // Nobody waits any more only if the run was given up.
                    let _ = finish.send(records);
                })?;
        }
        drop(report);
        let (mut opened, mut trouble) = (0, None);
        while let Some(connected) = reports.recv().await {
            match connected {
                Ok(()) => opened += 1,
                Err(error) => trouble = Some(error),
            }
        }
        match trouble {
            Some(error) if opened == 0 => bail!("no connection could be opened: {error}"),
            _ => Ok(Self {
                load,
                start,
                threads,
                opened,
            }),
        }
    }

    /// Sends the whole plan and returns when every purchase is over.
    ///
    /// # Errors
    ///
    /// A thread of the crowd died.
    pub(crate) async fn run(self, sending: Arc<Sending>, tally: Arc<Tally>) -> Result<Vec<Record>> {
        let agenda = Agenda::new(&sending.plan, sending.opening);
        let purchases = sending.plan.len();
        self.start.send_replace(Some(Arc::new(Work {
            load: self.load,
            sending,
            agenda,
            tally,
        })));
        let mut records = Vec::with_capacity(purchases);
        for thread in self.threads {
            records.extend(thread.await.context("a thread of the crowd died")?);
        }
        if records.len() != purchases {
            bail!(
                "{} of {purchases} purchases were not followed",
                purchases - records.len()
            );
        }
        records.sort_unstable_by_key(|record| record.purchase);
        Ok(records)
    }
}

/// One connection and the purchases that went over it.
struct Worker {
    connection: Option<Connection>,
    jitter: SmallRng,
    records: Vec<Record>,
}

impl Worker {
    /// Connects, says so, waits for the plan and does its part.
    async fn stand(
        mut self,
        load: Load,
        gate: Arc<Semaphore>,
        report: mpsc::Sender<Result<(), String>>,
        mut started: watch::Receiver<Option<Arc<Work>>>,
    ) -> Vec<Record> {
        {
            let _turn = gate.acquire().await;
            let connected = connect(&load).await;
            let told = connected.map(|connection| self.connection = Some(connection));
            // The receiver lives until every sender is gone.
            let _ = report.send(told).await;
        }
        drop(report);
        let work = match started.wait_for(Option::is_some).await {
            Ok(work) => work.clone(),
            // The run was given up before it began.
            Err(_) => None,
        };
        if let Some(work) = work {
            while let Some(waiting) = work.agenda.take() {
                self.wait(waiting.due, &work).await;
                self.attempt(waiting, &work).await;
            }
        }
        self.records
    }

    /// Waits, and replaces a connection that the server closes meanwhile: once, lest a server
    /// that wants nobody is asked again and again.
    async fn wait(&mut self, due: Instant, work: &Work) {
        let pause = sleep_until(due);
        tokio::pin!(pause);
        for reopen in [true, false] {
            let Some(connection) = &mut self.connection else {
                break;
            };
            tokio::select! {
                biased;
                () = &mut pause => return,
                () = connection.closed() => {}
            }
            self.connection = if reopen {
                connect(&work.load).await.ok()
            } else {
                None
            };
        }
        pause.await;
    }

    /// One try of one purchase.
    async fn attempt(&mut self, mut waiting: Waiting, work: &Work) {
        let begun = Instant::now();
        let next = match self.send(waiting.purchase, work).await {
            Err(Unsent(reason)) => Next::Again {
                setback: Setback::Broken(reason),
                doubtful: false,
                wait: Duration::ZERO,
            },
            Ok(answer) => {
                waiting.first_sent.get_or_insert(begun);
                match answer {
                    Ok(answer) => judge(answer, waiting.doubt.map(|since| since.elapsed())),
                    Err(reason) => Next::Again {
                        setback: Setback::Broken(reason),
                        doubtful: true,
                        wait: Duration::ZERO,
                    },
                }
            }
        };
        let now = Instant::now();
        let outcome = match next {
            Next::Done(outcome) => outcome,
            Next::Again {
                setback,
                doubtful,
                wait,
            } => {
                if doubtful {
                    waiting.doubt = Some(now);
                }
                let due = now + wait + self.pause(waiting.retries);
                let arrival = work.sending.plan[waiting.purchase].due;
                if due <= work.sending.opening + arrival + work.load.patience {
                    work.tally.retries.fetch_add(1, Ordering::Relaxed);
                    work.agenda.put(Waiting {
                        due,
                        retries: waiting.retries + 1,
                        ..waiting
                    });
                    return;
                }
                setback.give_up(waiting.doubt.is_some())
            }
        };
        work.tally.count(&outcome);
        let opening = work.sending.opening;
        self.records.push(Record {
            purchase: waiting.purchase,
            due: work.sending.plan[waiting.purchase].due,
            first_sent: waiting.first_sent.map(|sent| sent.duration_since(opening)),
            last_sent: begun.duration_since(opening),
            finished: now.duration_since(opening),
            retries: waiting.retries,
            outcome,
        });
    }

    /// Sends one request and waits for its answer; a lost answer is the inner error.
    async fn send(
        &mut self,
        purchase: usize,
        work: &Work,
    ) -> Result<Result<hyper::Response<Bytes>, String>, Unsent> {
        let mut connection = match self.connection.take() {
            Some(connection) if connection.is_open() => connection,
            _ => connect(&work.load).await.map_err(Unsent)?,
        };
        let request = work.sending.request(purchase, &work.load.target.host);
        Ok(
            match timeout(work.load.timeout, connection.exchange(request)).await {
                Ok(Ok(answer)) => {
                    self.connection = Some(connection);
                    Ok(answer)
                }
                Ok(Err(_)) => Err("connection lost".to_owned()),
                Err(_) => Err("no answer in time".to_owned()),
            },
        )
    }

    /// A growing pause with jitter, so that a crowd does not come back as one.
    fn pause(&mut self, retries: u32) -> Duration {
        let longest = PAUSE_MIN
            .saturating_mul(1 << retries.min(10))
            .min(PAUSE_MAX);
        longest.mul_f64(self.jitter.random_range(0.5..1.0))
    }
}

/// A new connection, or why there is none.
async fn connect(load: &Load) -> Result<Connection, String> {
    match timeout(load.timeout, Connection::open(load.target.address)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(format!("not connected: {}", error.kind())),
        Err(_) => Err("not connected: timed out".to_owned()),
    }
}

/// A request that never left this machine.
struct Unsent(String);

#[cfg(test)]
mod tests;
