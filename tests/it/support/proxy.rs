//! A bad network on purpose: a TCP proxy that a test tells what to do with the bytes that pass, while
//! connections live. It stands in front of Redis, of PostgreSQL, or of a node.
//!
//! What it draws by lot (how long, which reply) follows from the seed, the number of the connection
//! and the order of what passes on it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

/// What the server may still say on a connection whose client has been cut off.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(2);

/// What becomes of the bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Weather {
    /// They pass.
    #[default]
    Clear,
    /// Each piece waits, at most so long.
    Slow(Duration),
    /// They are held, and pass when the weather changes: also when their sender has gone by then.
    Stalled,
    /// So many pass, then the connection is cut.
    CutAfter(usize),
    /// Only towards the client: of the requests that contain `to`, so many in a hundred are
    /// delivered and answered, but the answer is swallowed and the connection cut.
    Swallowed {
        /// What such a request contains: a command of Redis, a statement of SQL, a line of HTTP.
        to: &'static str,
        /// How many.
        per_cent: u32,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct Sky {
    to_server: Weather,
    to_client: Weather,
    /// New connections are closed at once.
    shut: bool,
    /// A connection that was made at another number is cut.
    cuts: u64,
}

impl Sky {
    fn of(self, way: Way) -> Weather {
        match way {
            Way::ToServer => self.to_server,
            Way::ToClient => self.to_client,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToServer,
    ToClient,
}

/// What a proxy has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Connections taken.
    pub(crate) connections: AtomicU64,
    /// Connections cut, swallowed answers not counted.
    pub(crate) cut: AtomicU64,
    /// Answers swallowed, their connections cut.
    pub(crate) swallowed: AtomicU64,
    /// Pieces held for a while.
    pub(crate) held: AtomicU64,
}

/// A proxy on a port of its own. It ends, with its connections, when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    sky: watch::Sender<Sky>,
    pub(crate) counts: Arc<Counts>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Stands in front of this port of the loopback.
    pub(crate) async fn before(server: u16, seed: u64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let sky = watch::Sender::new(Sky::default());
        let counts = Arc::new(Counts::default());
        let accepting = tokio::spawn(accept(
            listener,
            server,
            seed,
            sky.subscribe(),
            Arc::clone(&counts),
        ));
        Self {
            port,
            sky,
            counts,
            accepting,
        }
    }

    /// The URL, led through here.
    pub(crate) fn url(&self, url: &SecretString) -> SecretString {
        let mut url = reqwest::Url::parse(url.expose_secret()).unwrap();
        url.set_port(Some(self.port)).unwrap();
        String::from(url).into()
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// From now on the weather is this, for connections that live too.
    pub(crate) fn weather(&self, to_server: Weather, to_client: Weather) {
        self.sky.send_modify(|sky| {
            sky.to_server = to_server;
            sky.to_client = to_client;
        });
    }

    /// From now on everything passes, and whoever comes is let in.
    pub(crate) fn clear(&self) {
        self.sky.send_modify(|sky| {
            *sky = Sky {
                cuts: sky.cuts,
                ..Sky::default()
            };
        });
    }

    /// Cuts every connection, now. What it holds is gone.
    pub(crate) fn cut(&self) {
        self.sky.send_modify(|sky| sky.cuts += 1);
    }

    /// Cuts every connection, and lets nobody in until it is [clear](Self::clear) again.
    pub(crate) fn shut(&self) {
        self.sky.send_modify(|sky| {
            sky.cuts += 1;
            sky.shut = true;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(
    listener: TcpListener,
    server: u16,
    seed: u64,
    sky: watch::Receiver<Sky>,
    counts: Arc<Counts>,
) {
    let mut connections = JoinSet::new();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        while connections.try_join_next().is_some() {}
        let number = counts.connections.fetch_add(1, Relaxed);
        if sky.borrow().shut {
            counts.cut.fetch_add(1, Relaxed);
            continue;
        }
        let connection = Connection {
            random: StdRng::seed_from_u64(seed.rotate_left(32) ^ number),
            sky: sky.clone(),
            counts: Arc::clone(&counts),
            doomed: Arc::default(),
        };
        connections.spawn(connection.carry(client, server));
    }
}

/// One connection; each of its ways has its own copy.
#[derive(Clone)]
struct Connection {
    random: StdRng,
    sky: watch::Receiver<Sky>,
    counts: Arc<Counts>,
    /// The next answer is to be swallowed.
    doomed: Arc<AtomicBool>,
}

/// Why a way ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// One side closed.
    Closed,
    Cut,
    Swallowed,
}

impl Connection {
    async fn carry(mut self, client: TcpStream, server: u16) {
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else {
            return;
        };
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let cuts = self.sky.borrow().cuts;
        let mut back = self.clone();
        // Its own lot, so that the two ways do not draw from each other.
        back.random = StdRng::seed_from_u64(self.random.random());
        let mut sky = self.sky.clone();
        let counts = Arc::clone(&self.counts);
        let end = tokio::select! {
            end = self.pass(Way::ToServer, &mut from_client, &mut to_server) => end,
            end = back.pass(Way::ToClient, &mut from_server, &mut to_client) => end,
            _ = sky.wait_for(|sky| sky.cuts != cuts) => End::Cut,
        };
        match end {
            End::Closed => {}
            End::Cut => {
                counts.cut.fetch_add(1, Relaxed);
            }
            End::Swallowed => {
                counts.swallowed.fetch_add(1, Relaxed);
                drop((from_client, to_client));
                // What has been delivered is carried out: an abrupt end could still prevent that.
                let _closed = to_server.shutdown().await;
                let mut rest = vec![0; 16 * 1024];
                let reading =
                    async { while matches!(from_server.read(&mut rest).await, Ok(1..)) {} };
                let _late = timeout(LAST_WORDS_WITHIN, reading).await;
            }
        }
    }

    async fn pass(&mut self, way: Way, from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf) -> End {
        let mut buffer = vec![0; 16 * 1024];
        let mut seen = Vec::new();
        let mut counted = (Weather::Clear, 0);
        loop {
            let length = match from.read(&mut buffer).await {
                Ok(0) | Err(_) => return End::Closed,
                Ok(length) => length,
            };
            let mut piece = &buffer[..length];
            if self.sky.borrow().of(way) == Weather::Stalled {
                self.counts.held.fetch_add(1, Relaxed);
                let changed = self.sky.wait_for(|sky| sky.of(way) != Weather::Stalled);
                if changed.await.is_err() {
                    return End::Cut;
                }
            }
            let sky = *self.sky.borrow();
            let mut cut = false;
            match sky.of(way) {
                Weather::Slow(up_to) => {
                    let wait = up_to.mul_f64(self.random.random());
                    sleep(wait).await;
                }
                weather @ Weather::CutAfter(bytes) => {
                    if counted.0 != weather {
                        counted = (weather, 0);
                    }
                    let room = bytes - counted.1;
                    cut = piece.len() >= room;
                    piece = &piece[..piece.len().min(room)];
                    counted.1 += piece.len();
                }
                Weather::Swallowed { .. } => {
                    if self.doomed.load(Relaxed) {
                        return End::Swallowed;
                    }
                }
                // Whom nobody swallowed in time is free.
                Weather::Clear | Weather::Stalled => self.doomed.store(false, Relaxed),
            }
            if way == Way::ToServer
                && let Weather::Swallowed {
                    to: words,
                    per_cent,
                } = sky.to_client
            {
                // Also one that arrives in two pieces.
                seen.extend_from_slice(piece);
                let times = seen
                    .windows(words.len())
                    .filter(|window| *window == words.as_bytes())
                    .count();
                for _ in 0..times {
                    if self.random.random_ratio(per_cent, 100) {
                        self.doomed.store(true, Relaxed);
                    }
                }
                let keep = seen.len().min(words.len() - 1);
                seen.drain(..seen.len() - keep);
            }
            if to.write_all(piece).await.is_err() {
                return End::Closed;
            }
            if cut {
                return End::Cut;
            }
        }
    }
}

/// What comes over a way.
pub(crate) enum BadWeather {
    Weather(Weather, Weather),
    Cut,
    Shut,
}

impl BadWeather {
    /// `to` is what makes an answer worth swallowing.
    pub(crate) fn draw(random: &mut StdRng, to: &'static str) -> Self {
        let slow = Weather::Slow(Duration::from_millis(random.random_range(1..100)));
        let short = Weather::CutAfter(random.random_range(1..20_000));
        let per_cent = random.random_range(10..=100);
        let swallowed = Weather::Swallowed { to, per_cent };
        match random.random_range(0..9) {
            0 => Self::Weather(slow, slow),
            1 => Self::Weather(Weather::Stalled, Weather::Clear),
            2 => Self::Weather(Weather::Clear, Weather::Stalled),
            3 => Self::Weather(Weather::Stalled, Weather::Stalled),
            4 => Self::Weather(short, Weather::Clear),
            5 => Self::Weather(Weather::Clear, short),
            6 => Self::Weather(Weather::Clear, swallowed),
            7 => Self::Cut,
            _ => Self::Shut,
        }
    }

    pub(crate) fn come(self, over: &Proxy) {
        match self {
            Self::Weather(to_server, to_client) => over.weather(to_server, to_client),
            Self::Cut => over.cut(),
            Self::Shut => over.shut(),
        }
    }
}
