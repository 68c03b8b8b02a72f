//! Many thousand subscribers of one sale's live stock on one thread: epoll, one buffer, and no
//! more parsing than the questions need.
//!
//! A frame that is byte for byte the last one is not parsed again: everybody gets the same ones.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{ClockId, Timespec, clock_gettime};
use tokio::sync::oneshot;

/// Connections from one source address: the kernel looks for a free port longer, the more are taken.
const PER_ADDRESS: usize = 1_000;

/// Connections that are being opened at once: fewer than a server's queue of new ones.
const OPENING_MAX: usize = 512;

/// Events taken from the kernel at a time.
const BATCH: usize = 512;

/// The longest event, or head of an answer, that is believed.
const PIECE_MAX: usize = 16 * 1024;

/// The longest age that is told apart, milliseconds.
const AGE_MAX_MS: usize = 60_000;

/// Whether and since when a subscriber looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Absent,
    /// Since this instant, microseconds.
    Connecting(i64),
    /// The request was sent; the connection began at this instant.
    Asked(i64),
    /// The answer has begun, but no frame has come.
    Answered(i64),
    Watching,
}

#[derive(Debug)]
struct Subscriber {
    socket: Option<OwnedFd>,
    stage: Stage,
    /// The beginning of an event whose end has not come yet.
    rest: Vec<u8>,
    last: Option<Shown>,
    /// When the last frame was read, microseconds.
    read_at: i64,
}

/// What a frame says, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown {
    /// As text, which is how ids compare; zeros behind it.
    id: [u8; ID_MAX],
    seq: u64,
    server_ms: i64,
}

/// The longest id that is taken, in bytes.
const ID_MAX: usize = 48;

/// What happened to the audience since the last question.
#[derive(Debug)]
pub(crate) struct Seen {
    /// From the beginning of a connection to its snapshot, microseconds.
    pub(crate) joined_us: Histogram<u64>,
    /// Age of the value when a frame was read, microseconds.
    pub(crate) age_read_us: Histogram<u64>,
    /// Age of the value on the screens: every millisecond of every subscriber counts.
    pub(crate) age_shown: Ages,
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    /// Connections that came to nothing or broke, by reason.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Frames whose id was not greater than the one before, with the two ids of the first.
    pub(crate) disorder: u64,
    pub(crate) first_disorder: Option<String>,
    /// What was shown before each frame, and when the frame came.
    pub(crate) steps: Vec<Step>,
    /// Time from one question to the kernel to the next: as long as the harness looked away.
    pub(crate) batches_us: Histogram<u64>,
    /// Of the audience's thread.
    pub(crate) effort: Effort,
    since: i64,
    cpu_since: Duration,
}

/// A subscriber's step from one value to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// The seq that was shown until then.
    pub(crate) from_seq: u64,
    /// When the next value was read, microseconds since the Unix epoch.
    pub(crate) at: i64,
}

/// How much of a thread's time was used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effort {
    cpu: Duration,
    wall: Duration,
}

impl Effort {
    /// From 0 to 1.
    pub(crate) fn share(self) -> f64 {
        self.cpu.as_secs_f64() / self.wall.as_secs_f64().max(1e-9)
    }
}

/// Ages in whole milliseconds, weighted with how long each was shown.
#[derive(Debug)]
pub(crate) struct Ages {
    /// How many more subscriptions show this age than the one before it.
    edges: Vec<i64>,
}

impl Ages {
    fn new() -> Self {
        Self {
            edges: vec![0; AGE_MAX_MS + 2],
        }
    }

    /// A value aged from `from` to `to` on a screen, microseconds.
    fn show(&mut self, from: i64, to: i64) {
        let bin = |us: i64| usize::try_from(us / 1000).unwrap_or(0).min(AGE_MAX_MS);
        self.edges[bin(from)] += 1;
        self.edges[bin(to) + 1] -= 1;
    }

    /// The age in milliseconds that is not exceeded for this share of the time.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let times = || {
            self.edges.iter().scan(0, |level, edge| {
                *level += edge;
                Some(*level)
            })
        };
        let total: i64 = times().sum();
        let mut seen = 0;
        // The whole last millisecond counts.
        let ages = (1..).zip(times());
        let reached = ages.map(|(ms, time)| {
            seen += time;
            (ms, seen)
        });
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of a run")]
        let is_reached = |seen: i64| total > 0 && seen as f64 >= total as f64 * share;
        let mut reached = reached.filter(|(_, seen)| is_reached(*seen));
        reached.next().map(|(ms, _): (u32, _)| f64::from(ms))
    }
}

impl Seen {
    fn new() -> Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, 600_000_000, 3);
        Ok(Self {
            joined_us: histogram()?,
            age_read_us: histogram()?,
            age_shown: Ages::new(),
            frames: 0,
            bytes: 0,
            errors: BTreeMap::new(),
            disorder: 0,
            first_disorder: None,
            steps: Vec::new(),
            batches_us: histogram()?,
            effort: Effort::default(),
            since: now_us(),
            cpu_since: thread_cpu(),
        })
    }

    /// Notes what this thread has used meanwhile.
    fn end(mut self) -> Self {
        let wall = u64::try_from(now_us() - self.since).unwrap_or(0);
        self.effort = Effort {
            cpu: thread_cpu().saturating_sub(self.cpu_since),
            wall: Duration::from_micros(wall),
        };
        self
    }

    fn error(&mut self, reason: impl Into<String>) {
        *self.errors.entry(reason.into()).or_default() += 1;
    }

    pub(crate) fn errors_total(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// All subscribers of one sale.
pub(crate) struct Audience {
    server: SocketAddr,
    /// Everything of a request up to where `Last-Event-ID` goes.
    request: String,
    epoll: OwnedFd,
    subscribers: Vec<Subscriber>,
    /// Who is to connect, the next one last.
    to_connect: Vec<usize>,
    connecting: usize,
    watching: usize,
    /// How many have been shown this seq or a later one.
    goal_seq: u64,
    at_goal: usize,
    cache: Cache,
    buffer: Vec<u8>,
    /// Whether ages and steps are being written down.
    measuring: bool,
    seen: Seen,
}

/// The frame that was read last.
#[derive(Debug, Default)]
struct Cache {
    piece: Vec<u8>,
    shown: Option<Shown>,
}

impl Audience {
    /// So many seats, nobody on them yet.
    pub(crate) fn new(server: SocketAddr, host: &str, path: &str, seats: usize) -> Result<Self> {
        ensure!(server.is_ipv4(), "live stock is measured on IPv4 loopback");
        let subscribers = (0..seats).map(|_| Subscriber {
            socket: None,
            stage: Stage::Absent,
            rest: Vec::new(),
            last: None,
            read_at: 0,
        });
        Ok(Self {
            server,
            request: format!(
                "GET {path} HTTP/1.1\r\nhost: {host}\r\naccept: text/event-stream\r\n"
            ),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            subscribers: subscribers.collect(),
            to_connect: (0..seats).rev().collect(),
            connecting: 0,
            watching: 0,
            goal_seq: 0,
            at_goal: 0,
            cache: Cache::default(),
            buffer: vec![0; 64 * 1024],
            measuring: false,
            seen: Seen::new()?,
        })
    }

    /// How many have a snapshot.
    pub(crate) fn watching(&self) -> usize {
        self.watching
    }

    /// Whether everybody was shown the goal.
    pub(crate) fn all_at_goal(&self) -> bool {
        self.at_goal == self.subscribers.len()
    }

    /// How many were shown the goal.
    pub(crate) fn at_goal(&self) -> usize {
        self.at_goal
    }

    /// Waits for this seq from now on.
    pub(crate) fn set_goal(&mut self, seq: u64) {
        self.goal_seq = seq;
        self.at_goal = self.subscribers.iter().filter(|s| s.is_at(seq)).count();
    }

    /// Forgets what was seen so far, and writes down ages from now on.
    pub(crate) fn measure(&mut self) -> Result<()> {
        self.seen = Seen::new()?;
        self.measuring = true;
        Ok(())
    }

    /// What was seen since the last question. The values that are still on the screens count up
    /// to now.
    pub(crate) fn take(&mut self) -> Result<Seen> {
        let now = now_us();
        if self.measuring {
            for subscriber in &self.subscribers {
                if let (Stage::Watching, Some(last)) = (subscriber.stage, &subscriber.last) {
                    let from = subscriber.read_at.max(self.seen.since);
                    let made = last.server_ms * 1000;
                    self.seen.age_shown.show(from - made, now - made);
                }
            }
        }
        self.measuring = false;
        Ok(std::mem::replace(&mut self.seen, Seen::new()?).end())
    }

    /// Cuts the first `count` off, all at once, to come back with `Last-Event-ID` as soon as they
    /// can.
    pub(crate) fn cut(&mut self, count: usize) {
        for seat in 0..count.min(self.subscribers.len()) {
            self.leave(seat);
        }
        self.to_connect.reverse();
    }

    /// Follows everybody until `done` says so or time is up. Returns whether it said so.
    pub(crate) fn follow(
        &mut self,
        patience: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Result<bool> {
        let patience = i64::try_from(patience.as_micros()).unwrap_or(i64::MAX);
        let until = now_us().saturating_add(patience);
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        let mut events = Vec::with_capacity(BATCH);
        loop {
            if done(self) {
                return Ok(true);
            }
            if now_us() >= until {
                return Ok(false);
            }
            self.connect_some()?;
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, Some(&tick)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let begun = now_us();
            for event in events.drain(..) {
                let seat = usize::try_from(event.data.u64())?;
                self.turn(seat);
            }
            let took = u64::try_from(now_us() - begun).unwrap_or(0);
            self.seen.batches_us.saturating_record(took.max(1));
        }
    }

    fn connect_some(&mut self) -> Result<()> {
        while self.connecting < OPENING_MAX {
            let Some(seat) = self.to_connect.pop() else {
                break;
            };
            if let Err(error) = self.connect(seat) {
                if matches!(error, Errno::MFILE | Errno::NFILE) {
                    bail!("no file left for subscriber {seat}");
                }
                self.seen.error(format!("not connected: {error}"));
                self.to_connect.insert(0, seat);
                break;
            }
        }
        Ok(())
    }

    fn connect(&mut self, seat: usize) -> rustix::io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        // Otherwise the other end of a cut connection keeps its port for a minute.
        rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
        if self.server.ip().is_loopback() {
            let block = u8::try_from(seat / PER_ADDRESS).unwrap_or(u8::MAX);
            let from = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2 + block));
            rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
        }
        match rustix::net::connect(&socket, &self.server) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(
            &self.epoll,
            &socket,
            EventData::new_u64(seat as u64),
            interest,
        )?;
        let subscriber = &mut self.subscribers[seat];
        subscriber.socket = Some(socket);
        subscriber.stage = Stage::Connecting(now_us());
        self.connecting += 1;
        Ok(())
    }

    /// Closes a connection; the seat is taken again when there is time.
    fn leave(&mut self, seat: usize) {
        let subscriber = &mut self.subscribers[seat];
        match subscriber.stage {
            Stage::Absent => return,
            Stage::Watching => self.watching -= 1,
            Stage::Connecting(_) | Stage::Asked(_) | Stage::Answered(_) => self.connecting -= 1,
        }
        subscriber.stage = Stage::Absent;
        subscriber.socket = None;
        subscriber.rest.clear();
        self.to_connect.push(seat);
    }

    fn lose(&mut self, seat: usize, reason: impl Into<String>) {
        self.seen.error(reason);
        self.leave(seat);
    }

    /// Something happened on a connection.
    fn turn(&mut self, seat: usize) {
        if let Stage::Connecting(since) = self.subscribers[seat].stage {
            match self.ask(seat) {
                Ok(true) => self.subscribers[seat].stage = Stage::Asked(since),
                Ok(false) => return,
                Err(error) => return self.lose(seat, format!("not connected: {error}")),
            }
        }
        loop {
            let Some(socket) = &self.subscribers[seat].socket else {
                return;
            };
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = rustix::io::read(socket, buffer.as_mut_slice());
            let more = match read {
                Ok(0) => {
                    self.lose(seat, "ended by the server");
                    false
                }
                Ok(count) => {
                    self.seen.bytes += count as u64;
                    if let Err(reason) = self.hear(seat, &buffer[..count]) {
                        self.lose(seat, reason);
                    }
                    count == buffer.len()
                }
                Err(Errno::AGAIN) => false,
                Err(Errno::INTR) => true,
                Err(error) => {
                    self.lose(seat, format!("cut: {error}"));
                    false
                }
            };
            self.buffer = buffer;
            if !more {
                return;
            }
        }
    }

    /// Sends the request as soon as there is a connection.
    fn ask(&self, seat: usize) -> io::Result<bool> {
        let subscriber = &self.subscribers[seat];
        let Some(socket) = &subscriber.socket else {
            return Ok(false);
        };
        rustix::net::sockopt::socket_error(socket)??;
        let mut request = self.request.clone();
        if let Some(last) = &subscriber.last {
            request.push_str("last-event-id: ");
            request.push_str(&last.id());
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        match rustix::io::write(socket, request.as_bytes()) {
            Ok(count) if count == request.len() => Ok(true),
            Ok(_) => Err(io::Error::other("the request did not fit")),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what a connection brought.
    fn hear(&mut self, seat: usize, bytes: &[u8]) -> Result<(), String> {
        let subscriber = &mut self.subscribers[seat];
        if subscriber.rest.is_empty()
            && subscriber.stage == Stage::Watching
            && bytes == self.cache.piece.as_slice()
            && let Some(shown) = self.cache.shown
        {
            self.show(seat, shown);
            return Ok(());
        }
        let mut rest = std::mem::take(&mut subscriber.rest);
        rest.extend_from_slice(bytes);
        let mut text = rest.as_slice();
        if let Stage::Asked(since) = subscriber.stage {
            let Some(end) = find(text, b"\r\n\r\n") else {
                return self.keep(seat, rest);
            };
            if !text.starts_with(b"HTTP/1.1 200 ") {
                let status = text.get(9..12).unwrap_or_default();
                return Err(format!("status {}", String::from_utf8_lossy(status)));
            }
            subscriber.stage = Stage::Answered(since);
            text = &text[end + 4..];
        }
        let mut events = 0;
        let mut last = None;
        while let Some(end) = find(text, b"\n\n") {
            let event = &text[..end + 2];
            text = &text[end + 2..];
            events += 1;
            if find(event, b"data: ").is_some() {
                let shown = parse(event).ok_or("a frame that cannot be read")?;
                self.show(seat, shown);
                last = Some(shown);
            }
        }
        // What closes a chunk is no beginning of an event.
        let tail = text.strip_prefix(b"\r\n").unwrap_or(text);
        if events == 1 && tail.is_empty() && last.is_some() && rest.len() == bytes.len() {
            self.cache.piece.clear();
            self.cache.piece.extend_from_slice(bytes);
            self.cache.shown = last;
        }
        let tail = tail.to_vec();
        self.keep(seat, tail)
    }

    fn keep(&mut self, seat: usize, rest: Vec<u8>) -> Result<(), String> {
        if rest.len() > PIECE_MAX {
            return Err("an endless event".to_owned());
        }
        self.subscribers[seat].rest = rest;
        Ok(())
    }

    /// A subscriber reads a frame.
    fn show(&mut self, seat: usize, shown: Shown) {
        let now = now_us();
        let subscriber = &mut self.subscribers[seat];
        let made = shown.server_ms * 1000;
        self.seen.frames += 1;
        let again = match subscriber.stage {
            Stage::Answered(since) => {
                subscriber.stage = Stage::Watching;
                self.connecting -= 1;
                self.watching += 1;
                let took = u64::try_from(now - since).unwrap_or(0);
                self.seen.joined_us.saturating_record(took.max(1));
                true
            }
            _ => false,
        };
        let was_at_goal = subscriber.is_at(self.goal_seq);
        if let Some(last) = subscriber.last {
            // A snapshot after a new connection may be what was seen already.
            let sound = if again {
                shown.id >= last.id
            } else {
                shown.id > last.id
            };
            if !sound {
                self.seen.disorder += 1;
                self.seen
                    .first_disorder
                    .get_or_insert_with(|| format!("{} after {}", shown.id(), last.id()));
            }
            if self.measuring {
                let before = last.server_ms * 1000;
                let from = subscriber.read_at.max(self.seen.since);
                self.seen.age_shown.show(from - before, now - before);
                let (from_seq, at) = (last.seq, now);
                self.seen.steps.push(Step { from_seq, at });
            }
        }
        if self.measuring {
            let age = u64::try_from(now - made).unwrap_or(0);
            self.seen.age_read_us.saturating_record(age.max(1));
        }
        subscriber.last = Some(shown);
        subscriber.read_at = now;
        if !was_at_goal && subscriber.is_at(self.goal_seq) {
            self.at_goal += 1;
        }
    }
}

impl Shown {
    fn id(&self) -> String {
        let id = self.id.split(|byte| *byte == 0).next();
        String::from_utf8_lossy(id.unwrap_or_default()).into_owned()
    }
}

impl Subscriber {
    fn is_at(&self, seq: u64) -> bool {
        self.last.is_some_and(|last| last.seq >= seq)
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// What an event says.
fn parse(event: &[u8]) -> Option<Shown> {
    let text = std::str::from_utf8(event).ok()?;
    let after = |name: &str| text.split_once(name).map(|(_, rest)| rest);
    let number = |name: &str| -> Option<u64> {
        let rest = after(name)?;
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        rest[..end].parse().ok()
    };
    let line = after("id: ")?.split('\n').next()?;
    let mut id = [0; ID_MAX];
    id.get_mut(..line.len())?.copy_from_slice(line.as_bytes());
    Some(Shown {
        id,
        seq: number("\"seq\":")?,
        server_ms: i64::try_from(number("\"server_time_ms\":")?).ok()?,
    })
}

type Job = Box<dyn FnOnce(&mut Audience) + Send>;

/// An audience on a thread of its own, which follows it all the time.
pub(crate) struct Hall {
    jobs: mpsc::Sender<Job>,
    /// Why it stopped following, if it did.
    ended: Arc<Mutex<Option<anyhow::Error>>>,
}

impl Hall {
    /// Lets everybody in.
    ///
    /// # Errors
    ///
    /// This machine has no thread left.
    pub(crate) fn open(mut audience: Audience) -> Result<Self> {
        let (jobs, asked) = mpsc::channel::<Job>();
        let ended = Arc::new(Mutex::new(None));
        let why = Arc::clone(&ended);
        thread::Builder::new()
            .name("audience".to_owned())
            .spawn(move || {
                let mut job = None;
                loop {
                    let next = |_: &Audience| match asked.try_recv() {
                        Err(TryRecvError::Empty) => false,
                        Ok(asked) => {
                            job = Some(asked);
                            true
                        }
                        Err(TryRecvError::Disconnected) => true,
                    };
                    if let Err(error) = audience.follow(Duration::MAX, next) {
                        *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        return;
                    }
                    // Without one nobody will ask any more.
                    let Some(job) = job.take() else {
                        return;
                    };
                    job(&mut audience);
                }
            })?;
        Ok(Self { jobs, ended })
    }

    /// Does something with it, on its thread.
    ///
    /// # Errors
    ///
    /// What was done failed, or the audience cannot be followed any more.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Audience) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move |audience| {
            // Nobody waits any more only if the run was given up.
            let _ = tell.send(job(audience));
        });
        if self.jobs.send(job).is_ok()
            && let Ok(done) = told.await
        {
            return done;
        }
        let why = self
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Err(why.unwrap_or_else(|| anyhow!("the audience's thread died")))
    }
}

/// Microseconds since the Unix epoch, by the clock that Redis reads, too.
fn now_us() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1000
}

/// An instant in microseconds since the Unix epoch.
pub(crate) fn epoch_us(instant: Instant) -> i64 {
    let us = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    let (now, now_us) = (Instant::now(), now_us());
    now_us + us(instant.saturating_duration_since(now)) - us(now.saturating_duration_since(instant))
}

fn thread_cpu() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(used.tv_sec).unwrap_or(0),
        u32::try_from(used.tv_nsec).unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::shop::{Faults, Shop};

    #[test]
    fn ages_count_for_as_long_as_they_are_shown() {
        let mut ages = Ages::new();
        assert_eq!(ages.quantile(0.5), None);
        // Ten milliseconds old for ninety, and an old one for ten.
        ages.show(10_000, 99_000);
        ages.show(500_000, 509_000);
        assert_eq!(ages.quantile(0.5), Some(60.0));
        assert_eq!(ages.quantile(0.9), Some(100.0));
        assert_eq!(ages.quantile(1.0), Some(510.0));
    }

    #[test]
    fn a_frame_is_read_and_nothing_else_is_taken_for_one() {
        let event = "event: stock\nid: 01-2\ndata: {\"seq\":7,\"server_time_ms\":9}\n\n";
        let shown = parse(event.as_bytes()).unwrap();
        assert_eq!(
            (shown.id().as_str(), shown.seq, shown.server_ms),
            ("01-2", 7, 9)
        );
        for bad in ["data: {}", "id: 1\ndata: {\"seq\":}", ""] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn an_audience_is_cut_off_and_comes_back_with_what_it_saw() {
        let shop = Shop::start(Faults::default());
        let sale = Uuid::from_u128(1);
        shop.put_up(sale, 10);
        let path = format!("/v1/sales/{sale}/events");
        let mut audience = Audience::new(shop.address, "shop", &path, 40).unwrap();
        let all = |audience: &Audience| audience.watching() == 40;
        assert!(audience.follow(Duration::from_secs(20), all).unwrap());
        audience.measure().unwrap();
        audience.cut(25);
        assert_eq!(audience.watching(), 15);
        assert!(audience.follow(Duration::from_secs(20), all).unwrap());
        assert!(audience.all_at_goal());
        audience.set_goal(1);
        assert_eq!(audience.at_goal(), 0);
        let seen = audience.take().unwrap();
        assert_eq!((seen.joined_us.len(), seen.disorder), (25, 0));
        assert!(seen.errors.is_empty(), "{:?}", seen.errors);
        drop(shop);
        let cut = |audience: &Audience| audience.watching() == 0;
        assert!(audience.follow(Duration::from_secs(20), cut).unwrap());
    }
}
