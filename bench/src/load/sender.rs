//! Sends the plan over many connections: each thread hands whatever is due to whoever is free.
//!
//! The model is open: when a purchase is sent never depends on how fast others were answered, and
//! its latency counts from the planned instant.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::sync::oneshot;

use super::connection::{Connection, Received};
use super::crowd::Arrival;
use super::outcome::{Answer, Next, Outcome, Setback};
use super::pulse::Pulse;
use crate::target::Target;

/// Connections that are being opened at once: fewer than a server's usual queue of new ones.
const OPENING_MAX: usize = 128;

/// The first and the longest pause before a purchase is tried again, unless the server asks for
/// a longer one.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Purchases due within so short a time are sent together: a wake-up costs as much as a request.
const GRAIN: Duration = Duration::from_micros(200);

/// Requests that leave before the next look at answers.
const TOGETHER_MAX: usize = 64;

/// Events of one look.
const EVENTS_MAX: usize = 256;

/// Between two looks for answers that did not come in time.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What leaves later than this although a connection was free, the harness delayed.
const LATE: Duration = Duration::from_millis(10);

/// An answer: one such buffer serves a whole thread.
const BUFFER: usize = 64 * 1024;

/// The usual body has room in so many bytes.
const BODY: usize = 4096;

/// Bodies that are kept in one piece of memory, in bytes.
const BODIES: usize = 1024 * 1024;

/// The name of the timer among the connections.
const TIMER: u64 = u64::MAX;

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
    /// Of every so many purchases one loses its connection as soon as it was sent.
    pub(crate) cuts_every: Option<usize>,
    /// For the jitter between tries.
    pub(crate) seed: u64,
}

/// Requests that differ only in who asks, for which sale, and with which key.
#[derive(Debug)]
pub(crate) struct Requests {
    /// Of each sale: from the request line to the name of the header with the token.
    heads: Vec<String>,
    /// `Authorization` of each buyer.
    bearers: Vec<String>,
    /// What the keys begin with.
    keys: String,
    /// From the length of the body on.
    tail: String,
}

impl Requests {
    /// `POST`s of JSON.
    pub(crate) fn new(
        target: &Target,
        paths: impl IntoIterator<Item = String>,
        bearers: Vec<String>,
        keys: String,
        body: &str,
    ) -> Self {
        let host = &target.authority;
        let head = |path: String| {
            format!(
                "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
                 authorization: "
            )
        };
        Self {
            heads: paths.into_iter().map(head).collect(),
            bearers,
            keys,
            tail: format!("\r\ncontent-length: {}\r\n\r\n{body}", body.len()),
        }
    }

    /// The request of one purchase, the same at every try.
    fn write(&self, arrival: &Arrival, into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(self.heads[arrival.sale].as_bytes());
        into.extend_from_slice(self.bearers[arrival.buyer].as_bytes());
        // Writing to a vector cannot fail.
        let _ = write!(into, "\r\nidempotency-key: {}-{}", self.keys, arrival.key);
        into.extend_from_slice(self.tail.as_bytes());
    }
}

/// Everything that is sent, ready before the opening.
pub(crate) struct Sending {
    pub(crate) requests: Arc<Requests>,
    pub(crate) plan: Vec<Arrival>,
    /// What an answer means, when an answer to the same key was lost so long ago.
    pub(crate) judge: fn(Answer, Option<Duration>) -> Next,
    /// When the sale opens: the instant from which the plan counts.
    pub(crate) opening: Instant,
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

/// What became of the whole plan.
#[derive(Debug)]
pub(crate) struct Sent {
    /// In the order of the plan.
    pub(crate) records: Vec<Record>,
    /// Tries that left late although a connection was free.
    pub(crate) late: usize,
}

/// Counts that a progress bar can show while the crowd is at it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) accepted: AtomicUsize,
    pub(crate) refused: AtomicUsize,
    pub(crate) failed: AtomicUsize,
    pub(crate) retries: AtomicUsize,
    /// How long purchases took, from their planned instants.
    pub(crate) pulse: Pulse,
}

impl Tally {
    /// Purchases that ended.
    pub(crate) fn ended(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
            + self.refused.load(Ordering::Relaxed)
            + self.failed.load(Ordering::Relaxed)
    }

    fn count(&self, outcome: &Outcome, took: Duration) {
        self.pulse.record(took);
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

/// The work of one run, shared by all threads.
struct Work {
    sending: Arc<Sending>,
    tally: Arc<Tally>,
}

/// A thread of the crowd whose connections stand.
struct Standing {
    start: mpsc::Sender<Work>,
    finished: oneshot::Receiver<Result<Sent>>,
}

/// Connections that stand and wait for the plan.
pub(crate) struct Pool {
    threads: Vec<Standing>,
    /// Connections that could be opened.
    pub(crate) opened: usize,
}

impl Pool {
    /// Opens the connections.
    ///
    /// # Errors
    ///
    /// Not a single one could be opened.
    pub(crate) async fn open(load: &Load) -> Result<Self> {
        let mut pool = Self {
            threads: Vec::with_capacity(load.threads),
            opened: 0,
        };
        let mut openings = Vec::with_capacity(load.threads);
        for n in 0..load.threads {
            let share =
                load.connections / load.threads + usize::from(n < load.connections % load.threads);
            let mut crew = Crew::new(load.clone(), n, share)?;
            let (start, started) = mpsc::channel::<Work>();
            let (tell, told) = oneshot::channel();
            let (finish, finished) = oneshot::channel();
            thread::Builder::new()
                .name(format!("crowd-{n}"))
                .spawn(move || {
                    // Nobody listens any more only if the run was given up.
                    let _ = tell.send(crew.open());
                    if let Ok(work) = started.recv() {
                        let _ = finish.send(crew.run(&work));
                    }
                })?;
            pool.threads.push(Standing { start, finished });
            openings.push(told);
        }
        let mut trouble = None;
        for told in openings {
            let (opened, error) = told.await.context("a thread of the crowd died")??;
            pool.opened += opened;
            trouble = trouble.or(error);
        }
        match trouble {
            Some(error) if pool.opened == 0 => bail!("no connection could be opened: {error}"),
            _ => Ok(pool),
        }
    }

    /// Sends the whole plan and returns when every purchase is over.
    ///
    /// # Errors
    ///
    /// A thread of the crowd died.
    pub(crate) async fn run(self, sending: Arc<Sending>, tally: Arc<Tally>) -> Result<Sent> {
        let purchases = sending.plan.len();
        for thread in &self.threads {
            let work = Work {
                sending: Arc::clone(&sending),
                tally: Arc::clone(&tally),
            };
            thread
                .start
                .send(work)
                .context("a thread of the crowd died")?;
        }
        let mut all = Sent {
            records: Vec::with_capacity(purchases),
            late: 0,
        };
        for thread in self.threads {
            let sent = thread
                .finished
                .await
                .context("a thread of the crowd died")??;
            all.records.extend(sent.records);
            all.late += sent.late;
        }
        if all.records.len() != purchases {
            bail!(
                "{} of {purchases} purchases were not followed",
                purchases - all.records.len()
            );
        }
        all.records.sort_unstable_by_key(|record| record.purchase);
        Ok(all)
    }
}

/// What a connection is at.
struct Errand {
    waiting: Waiting,
    begun: Instant,
    /// The request left; before that the connection is being opened.
    sent: bool,
}

/// A place for a connection.
struct Slot {
    /// None: it is opened when it is needed.
    connection: Option<Connection>,
    errand: Option<Errand>,
    free_since: Instant,
}

/// One thread's connections and purchases.
struct Crew {
    load: Load,
    epoll: OwnedFd,
    timer: OwnedFd,
    slots: Vec<Slot>,
    /// Who is free, the longest first: a crowd uses all its connections.
    free: VecDeque<usize>,
    /// The next purchase of the plan, which is in order of time.
    next: usize,
    /// Purchases that are tried again, the most urgent on top.
    again: BinaryHeap<Reverse<Waiting>>,
    jitter: SmallRng,
    buffer: Vec<u8>,
    bodies: BytesMut,
    request: Vec<u8>,
    records: Vec<Record>,
    late: usize,
    /// When the timer rings.
    armed: Option<Instant>,
}

impl Crew {
    fn new(load: Load, thread: usize, connections: usize) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        // It says once that it rang.
        let once = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), once)?;
        let slot = |_| Slot {
            connection: None,
            errand: None,
            free_since: Instant::now(),
        };
        Ok(Self {
            epoll,
            timer,
            slots: (0..connections).map(slot).collect(),
            free: (0..connections).collect(),
            next: thread,
            again: BinaryHeap::new(),
            jitter: SmallRng::seed_from_u64(load.seed.wrapping_add(thread as u64)),
            buffer: vec![0; BUFFER],
            bodies: BytesMut::new(),
            request: Vec::new(),
            records: Vec::new(),
            late: 0,
            armed: None,
            load,
        })
    }

    /// Opens the connections; says how many stand, and why not all.
    fn open(&mut self) -> Result<(usize, Option<String>)> {
        let (mut begun, mut opened, mut trouble) = (0, 0, None);
        let mut under_way = 0;
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let deadline = Instant::now() + self.load.timeout;
        while (begun < self.slots.len() || under_way > 0) && Instant::now() < deadline {
            while begun < self.slots.len() && under_way < OPENING_MAX {
                match self.connect(begun) {
                    Ok(()) => under_way += 1,
                    Err(error) => trouble = Some(error.kind().to_string()),
                }
                begun += 1;
            }
            self.look(&mut events)?;
            for n in events.drain(..).filter_map(|event| slot_of(&event)) {
                under_way -= 1;
                match self.stands(n) {
                    Ok(()) => opened += 1,
                    Err(error) => {
                        self.slots[n].connection = None;
                        trouble = Some(error.kind().to_string());
                    }
                }
            }
        }
        if under_way > 0 {
            trouble = Some("timed out".to_owned());
        }
        Ok((opened, trouble))
    }

    /// Sends this thread's part of the plan: of every so many purchases as there are threads the one
    /// with its number.
    fn run(mut self, work: &Work) -> Result<Sent> {
        let share = work.sending.plan.len().div_ceil(self.load.threads);
        self.records.reserve(share);
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut looked = Instant::now();
        while self.due(work).is_some() || self.free.len() < self.slots.len() {
            self.hand_out(work);
            self.arm(work)?;
            self.look(&mut events)?;
            for event in events.drain(..) {
                if let Some(n) = slot_of(&event) {
                    self.proceed(n, work);
                }
            }
            if looked.elapsed() > LOOK_AGAIN {
                looked = Instant::now();
                self.give_up_late(work);
            }
        }
        Ok(Sent {
            records: self.records,
            late: self.late,
        })
    }

    /// When the next try is due.
    fn due(&self, work: &Work) -> Option<Instant> {
        let Sending { plan, opening, .. } = &*work.sending;
        let planned = plan.get(self.next).map(|arrival| *opening + arrival.due);
        let again = self.again.peek().map(|Reverse(waiting)| waiting.due);
        [planned, again].into_iter().flatten().min()
    }

    /// The next try, if it is due.
    fn take(&mut self, now: Instant, work: &Work) -> Option<Waiting> {
        let due = self.due(work).filter(|due| *due <= now)?;
        let is_again = |Reverse(waiting): &Reverse<Waiting>| waiting.due == due;
        if self.again.peek().is_some_and(is_again) {
            return self.again.pop().map(|Reverse(waiting)| waiting);
        }
        let purchase = self.next;
        self.next += self.load.threads;
        Some(Waiting {
            due,
            purchase,
            retries: 0,
            first_sent: None,
            doubt: None,
        })
    }

    /// Waits until something happens, at most for a moment.
    fn look(&self, events: &mut Vec<epoll::Event>) -> Result<()> {
        let moment = Timespec::try_from(LOOK_AGAIN)?;
        match epoll::wait(&self.epoll, spare_capacity(events), Some(&moment)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the timer ring when somebody who is free has something to send.
    fn arm(&mut self, work: &Work) -> Result<()> {
        let Some(due) = self.due(work) else {
            return Ok(());
        };
        let now = Instant::now();
        let ring = due.max(now + GRAIN);
        // Without anybody free an answer comes first. A ring in time is left as it is.
        let is_armed = self.armed.is_some_and(|armed| armed > now && armed <= ring);
        if self.free.is_empty() || is_armed {
            return Ok(());
        }
        self.armed = Some(ring);
        let ring = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(ring.saturating_duration_since(now))?,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &ring)?;
        Ok(())
    }

    /// Begins to open a connection.
    fn connect(&mut self, n: usize) -> io::Result<()> {
        let connection = Connection::begin(self.load.target.address)?;
        let name = EventData::new_u64(n as u64);
        let events = EventFlags::IN | EventFlags::OUT;
        epoll::add(&self.epoll, connection.socket(), name, events)?;
        self.slots[n].connection = Some(connection);
        Ok(())
    }

    /// A connection that was being opened: whether it stands. Then only answers are waited for.
    fn stands(&mut self, n: usize) -> io::Result<()> {
        let Some(connection) = &self.slots[n].connection else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        connection.stands()?;
        let name = EventData::new_u64(n as u64);
        epoll::modify(&self.epoll, connection.socket(), name, EventFlags::IN)?;
        Ok(())
    }

    /// Gives what is due to those who are free.
    fn hand_out(&mut self, work: &Work) {
        for _ in 0..TOGETHER_MAX {
            let now = Instant::now();
            let Some(n) = self.free.front().copied() else {
                return;
            };
            let Some(waiting) = self.take(now, work) else {
                return;
            };
            self.free.pop_front();
            let slot = &mut self.slots[n];
            self.late += usize::from(now - waiting.due.max(slot.free_since) > LATE);
            slot.errand = Some(Errand {
                waiting,
                begun: now,
                sent: false,
            });
            if slot.connection.is_some() {
                self.send(n, work);
            } else if let Err(error) = self.connect(n) {
                self.never_sent(n, format!("not connected: {}", error.kind()), work);
            }
        }
    }

    /// Sends the request of a connection's errand.
    fn send(&mut self, n: usize, work: &Work) {
        let slot = &mut self.slots[n];
        let (Some(errand), Some(connection)) = (&mut slot.errand, &mut slot.connection) else {
            return;
        };
        errand.sent = true;
        errand.begun = Instant::now();
        let Waiting {
            purchase, retries, ..
        } = errand.waiting;
        let arrival = &work.sending.plan[purchase];
        work.sending.requests.write(arrival, &mut self.request);
        let sent = connection.send(&self.request);
        let cut = |every: usize| retries == 0 && purchase.is_multiple_of(every);
        if sent.is_err() || self.load.cuts_every.is_some_and(cut) {
            self.lost(n, "connection lost", work);
        }
    }

    /// Something happened on a connection.
    fn proceed(&mut self, n: usize, work: &Work) {
        match &self.slots[n].errand {
            Some(errand) if errand.sent => {
                let slot = &mut self.slots[n];
                let Some(connection) = &mut slot.connection else {
                    return;
                };
                if self.bodies.capacity() < BODY {
                    self.bodies = BytesMut::with_capacity(BODIES);
                }
                match connection.receive(&mut self.buffer, &mut self.bodies) {
                    Received::Part => {}
                    Received::Lost => self.lost(n, "connection lost", work),
                    Received::Answer(answer) => {
                        if answer.closes {
                            slot.connection = None;
                        }
                        let doubt = slot.errand.as_ref().and_then(|errand| errand.waiting.doubt);
                        let doubt = doubt.map(|since| since.elapsed());
                        self.finish(n, (work.sending.judge)(answer, doubt), work);
                    }
                }
            }
            Some(_) => match self.stands(n) {
                Ok(()) => self.send(n, work),
                Err(error) => {
                    self.never_sent(n, format!("not connected: {}", error.kind()), work);
                }
            },
            // Whatever comes without having been asked for: most likely the end.
            None => self.slots[n].connection = None,
        }
    }

    /// Answers and connections that take too long.
    fn give_up_late(&mut self, work: &Work) {
        for n in 0..self.slots.len() {
            match &self.slots[n].errand {
                Some(errand) if errand.begun.elapsed() > self.load.timeout => {
                    if errand.sent {
                        self.lost(n, "no answer in time", work);
                    } else {
                        self.never_sent(n, "not connected: timed out".to_owned(), work);
                    }
                }
                _ => {}
            }
        }
    }

    /// The request never left this machine.
    fn never_sent(&mut self, n: usize, reason: String, work: &Work) {
        self.slots[n].connection = None;
        let next = Next::Again {
            setback: Setback::Broken(reason),
            doubtful: false,
            wait: Duration::ZERO,
        };
        self.finish(n, next, work);
    }

    /// The request left, and no answer will come.
    fn lost(&mut self, n: usize, reason: &str, work: &Work) {
        self.slots[n].connection = None;
        let next = Next::Again {
            setback: Setback::Broken(reason.to_owned()),
            doubtful: true,
            wait: Duration::ZERO,
        };
        self.finish(n, next, work);
    }

    /// One try of one purchase is over.
    fn finish(&mut self, n: usize, next: Next, work: &Work) {
        let now = Instant::now();
        let slot = &mut self.slots[n];
        slot.free_since = now;
        let Some(Errand {
            mut waiting,
            begun,
            sent,
        }) = slot.errand.take()
        else {
            return;
        };
        self.free.push_back(n);
        if sent {
            waiting.first_sent.get_or_insert(begun);
        }
        let Sending { plan, opening, .. } = &*work.sending;
        let arrival = &plan[waiting.purchase];
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
                if due <= *opening + arrival.due + self.load.patience {
                    work.tally.retries.fetch_add(1, Ordering::Relaxed);
                    waiting.due = due;
                    waiting.retries += 1;
                    self.again.push(Reverse(waiting));
                    return;
                }
                setback.give_up(waiting.doubt.is_some())
            }
        };
        let took = now.saturating_duration_since(*opening + arrival.due);
        work.tally.count(&outcome, took);
        self.records.push(Record {
            purchase: waiting.purchase,
            due: arrival.due,
            first_sent: waiting.first_sent.map(|sent| sent.duration_since(*opening)),
            last_sent: begun.duration_since(*opening),
            finished: now.duration_since(*opening),
            retries: waiting.retries,
            outcome,
        });
    }

    /// A growing pause with jitter, so that a crowd does not come back as one.
    fn pause(&mut self, retries: u32) -> Duration {
        let longest = PAUSE_MIN
            .saturating_mul(1 << retries.min(10))
            .min(PAUSE_MAX);
        longest.mul_f64(self.jitter.random_range(0.5..1.0))
    }
}

/// Which connection an event is about; none: it is the timer's.
fn slot_of(event: &epoll::Event) -> Option<usize> {
    // The structure is packed: it must be copied before it is looked into.
    let data = event.data;
    usize::try_from(data.u64())
        .ok()
        .filter(|_| data.u64() != TIMER)
}

#[cfg(test)]
mod tests;
