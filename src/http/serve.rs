//! Listens: accepts connections, speaks HTTP on them, and takes those that become event streams
//! away from the HTTP library.
//!
//! A subscriber stays for hours and only ever gets bytes that are the same for everybody. The
//! buffers and the state of a connection that could still carry any request are many times what
//! that needs, so its socket is taken out, and what is left of it is one small task.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::{pending, poll_fn},
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request},
    http::{
        Method, Request as HttpRequest, Version,
        header::{CONNECTION, CONTENT_LENGTH, DATE, TRANSFER_ENCODING},
    },
    response::Response,
};
use bytes::Bytes;
use futures::FutureExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use rustix::net::sockopt::set_socket_send_buffer_size;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::tls::{Tls, TlsSocket};
use crate::{clock, config::Networks, metrics::LimitMetrics, realtime::Events, throttle::network};

/// What the kernel may hold for a subscriber who does not read, bytes: a few seconds of frames.
/// Whoever is slower than that skips to the last one.
const UNREAD_MAX: usize = 8 * 1024;

/// What ends a body in chunks.
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The pause after a connection could not be accepted: for want of files, most likely, which ends
/// only when somebody leaves.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a connection may take to get to its first request. Browsers open some before they need
/// them.
const FIRST_REQUEST: Duration = Duration::from_secs(15);

/// How long a connection stays on which nothing is asked and nothing is answered, at least; at most
/// twice as long. Proxies keep theirs for a minute, and must not find them closed at the last moment.
/// What a client sends does not count until it is a request: it may be one letter a second.
const IDLE: Duration = Duration::from_secs(65);

/// What a connection may still say once it has been asked to end.
const FAREWELL: Duration = Duration::from_secs(1);

/// The largest head of a request, in bytes: its line, address included, and its headers.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// The most headers of a request.
const HEADERS_MAX: usize = 100;

/// The largest list of headers over HTTP/2, in bytes, when they are unpacked.
const HEADER_LIST_MAX: u32 = 64 * 1024;

/// Requests under way on one connection of HTTP/2, streams of events included.
const CONCURRENT_MAX: u32 = 128;

/// Streams that a client may open and cancel before anybody has looked at them ("rapid reset"); then
/// its connection ends.
const RESETS_MAX: usize = 20;

/// Streams that we may reset because of what a client did; then its connection ends.
const OWN_RESETS_MAX: usize = 256;

/// What a client may send ahead, per stream and per connection, and what waits for it; bytes.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const UNSENT_MAX: usize = 128 * 1024;

/// Who is let in to a listener, and how.
#[derive(Clone)]
pub struct Door {
    /// Connections that are served at once. Others wait in the kernel's queue: each costs a file, and
    /// the stores need some, too.
    pub connections: usize,
    /// Connections from one address; one more is closed at once, so that nobody takes all seats.
    pub per_address: usize,
    /// Addresses that speak for many: their connections are not counted.
    pub uncounted: Vec<Networks>,
    /// What is spoken on top of TCP, if it is TLS.
    pub tls: Option<Tls>,
    /// Where it is told who was not let in.
    pub metrics: LimitMetrics,
}

/// Serves `router` until `stop`; done when the last connection is.
pub async fn serve(listener: TcpListener, router: Router, door: Door, stop: CancellationToken) {
    let open = TaskTracker::new();
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept(&listener, &router, &door, &open, &stop) => {}
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// Lets people in for ever.
async fn accept(
    listener: &TcpListener,
    router: &Router,
    door: &Door,
    open: &TaskTracker,
    stop: &CancellationToken,
) {
    let seats = Arc::new(Semaphore::new(door.connections.min(Semaphore::MAX_PERMITS)));
    let guests = Guests::default();
    // It is never closed.
    while let Ok(seat) = Arc::clone(&seats).acquire_owned().await {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Not somebody who left before he was let in.
                if !matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                ) {
                    tracing::error!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        let Some(guest) = guests.admit(door, peer.ip()) else {
            door.metrics.connections.inc();
            continue;
        };
        // Answers are small: they should not wait for more. A closed socket says so by itself.
        let _ = socket.set_nodelay(true);
        let (router, tls, stop) = (router.clone(), door.tls.clone(), stop.clone());
        let streams = open.clone();
        open.spawn(async move {
            let Some(socket) = Socket::open(socket, tls).await else {
                return;
            };
            if let Some(parted) = speak(socket, peer, router, stop).await {
                // In a task of its own: this one is much larger.
                streams.spawn(async move {
                    stream(parted).await;
                    drop((seat, guest));
                });
            }
        });
    }
}

/// How many connections each address has.
#[derive(Clone, Default)]
struct Guests(Arc<Mutex<HashMap<u128, usize>>>);

/// A connection, counted while it lasts.
struct Guest {
    guests: Guests,
    /// `None` if it is not counted.
    from: Option<u128>,
}

impl Guests {
    fn counts(&self) -> MutexGuard<'_, HashMap<u128, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more from an address, unless it has too many.
    fn admit(&self, door: &Door, address: IpAddr) -> Option<Guest> {
        let speaks_for_many = |networks: &Networks| networks.contain(address);
        let from = if door.uncounted.iter().any(speaks_for_many) {
            None
        } else {
            let from = network(address);
            let mut counts = self.counts();
            let count = counts.entry(from).or_default();
            if *count >= door.per_address {
                return None;
            }
            *count += 1;
            Some(from)
        };
        let guests = self.clone();
        Some(Guest { guests, from })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let Some(from) = self.from else { return };
        let mut counts = self.guests.counts();
        if let Some(count) = counts.get_mut(&from) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&from);
            }
        }
    }
}

/// What bytes travel over.
enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsSocket>),
}

impl Socket {
    /// Shakes hands, if that is the custom; `None` if the other side does not.
    async fn open(socket: TcpStream, tls: Option<Tls>) -> Option<Self> {
        let Some(tls) = tls else {
            return Some(Self::Plain(socket));
        };
        match tokio::time::timeout(FIRST_REQUEST, tls.accept(socket)).await {
            Ok(Ok(socket)) => Some(Self::Tls(Box::new(socket))),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no TLS on a connection");
                None
            }
            Err(_) => None,
        }
    }
}

/// Does the same to either kind.
macro_rules! either {
    ($socket:expr, $inner:ident => $do:expr) => {
        match $socket {
            Socket::Plain($inner) => {
                let $inner = Pin::new($inner);
                $do
            }
            Socket::Tls($inner) => {
                let $inner = Pin::new($inner);
                $do
            }
        }
    };
}

/// An answer that never ends: the events of a subscriber, in an answer's extensions.
#[derive(Clone)]
pub(super) struct Endless(Arc<Mutex<Option<Events>>>);

impl Endless {
    pub(super) fn new(events: Events) -> Self {
        Self(Arc::new(Mutex::new(Some(events))))
    }

    fn take(&self) -> Option<Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A socket that is no HTTP connection any more: the head of an answer, and what follows it.
struct Parted {
    socket: TcpStream,
    head: Vec<u8>,
    events: Events,
}

/// A socket as the HTTP library sees it, with a way to take it back.
#[derive(Clone)]
struct Wire(Arc<Mutex<Ends>>);

struct Ends {
    /// `None` once it has been taken back.
    socket: Option<Socket>,
    /// Requests so far.
    requests: u64,
    /// Requests and writes so far.
    moves: u64,
    /// Whether something was written that the library has not followed up with a flush: then it
    /// may have more to write.
    unflushed: bool,
    parted: Option<Parted>,
}

impl Wire {
    fn new(socket: Socket) -> Self {
        Self(Arc::new(Mutex::new(Ends {
            socket: Some(socket),
            requests: 0,
            moves: 0,
            unflushed: false,
            parted: None,
        })))
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the socket from the library, which waits for this answer, to go on without it.
    /// Gives the events back if it still has something to write.
    fn part(&self, head: Vec<u8>, events: Events) -> Result<(), Events> {
        let mut ends = self.ends();
        if ends.unflushed {
            return Err(events);
        }
        match ends.socket.take() {
            Some(Socket::Plain(socket)) => {
                ends.parted = Some(Parted {
                    socket,
                    head,
                    events,
                });
                Ok(())
            }
            // What is encrypted stays with whoever encrypts.
            other => {
                ends.socket = other;
                Err(events)
            }
        }
    }

    fn asked(&self) {
        let mut ends = self.ends();
        ends.requests += 1;
        ends.moves += 1;
    }

    /// Done when nobody seems to be there any more.
    async fn deserted(&self) {
        tokio::time::sleep(FIRST_REQUEST).await;
        if self.ends().requests == 0 {
            return;
        }
        loop {
            let before = self.ends().moves;
            tokio::time::sleep(IDLE).await;
            if self.ends().moves == before {
                return;
            }
        }
    }

    fn parted(&self) -> Option<Parted> {
        self.ends().parted.take()
    }
}

impl Ends {
    fn socket(&mut self) -> io::Result<&mut Socket> {
        let socket = self.socket.as_mut();
        socket.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Notes what came of a write.
    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.moves += u64::from(matches!(written, Poll::Ready(Ok(1..))));
        written
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self.ends().socket()?, socket => socket.poll_read(context, buffer))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut ends = self.ends();
        ends.unflushed = true;
        let written = either!(ends.socket()?, socket => socket.poll_write(context, bytes));
        ends.wrote(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut ends = self.ends();
        ends.unflushed = true;
        let written =
            either!(ends.socket()?, socket => socket.poll_write_vectored(context, slices));
        ends.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ends = self.ends();
        ready!(either!(ends.socket()?, socket => socket.poll_flush(context)))?;
        ends.unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.ends().socket()?, socket => socket.poll_shutdown(context))
    }
}

/// Speaks HTTP on a connection until it is over, or until a stream is all that is left of it.
async fn speak(
    socket: Socket,
    peer: SocketAddr,
    router: Router,
    stop: CancellationToken,
) -> Option<Parted> {
    let wire = Wire::new(socket);
    let service = service_fn(|request: HttpRequest<Incoming>| {
        wire.asked();
        answer(request.map(Body::new), peer, router.clone(), wire.clone())
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .max_concurrent_streams(CONCURRENT_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(OWN_RESETS_MAX)
        .max_header_list_size(HEADER_LIST_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(UNSENT_MAX);
    let mut deserted = pin!(wire.deserted());
    let mut speaking = pin!(builder.serve_connection(TokioIo::new(wire.clone()), service));
    let mut stopping = pin!(stop.cancelled().fuse());
    loop {
        // Answers are made while the connection is polled, so this is when it may have parted.
        // Then it is over for the library, too, which may have noticed.
        let spoken = poll_fn(|context| {
            let over = speaking.as_mut().poll(context).is_ready();
            match wire.parted() {
                None if !over => Poll::Pending,
                parted => Poll::Ready(parted),
            }
        });
        tokio::select! {
            biased;
            parted = spoken => return parted,
            () = &mut stopping => speaking.as_mut().graceful_shutdown(),
            () = &mut deserted => {
                // Whoever is only silent hears of it; whoever is in the middle of a word does not.
                speaking.as_mut().graceful_shutdown();
                let _ = tokio::time::timeout(FAREWELL, speaking).await;
                return None;
            }
        }
    }
}

/// Answers a request; never, if the answer is a stream that goes on without the HTTP library.
async fn answer(
    mut request: Request,
    peer: SocketAddr,
    router: Router,
    wire: Wire,
) -> Result<Response, Infallible> {
    request.extensions_mut().insert(ConnectInfo(peer));
    // HEAD has no stream, HTTP/1.0 no chunks, and HTTP/2 several answers on one socket.
    let may_part = request.method() == Method::GET && request.version() == Version::HTTP_11;
    let mut response = router.oneshot(request).await?;
    let endless = response.extensions_mut().remove::<Endless>();
    if let Some(mut events) = endless.and_then(|endless| endless.take()) {
        // The router has counted the bytes of a body that is not there.
        response.headers_mut().remove(CONTENT_LENGTH);
        if may_part {
            match wire.part(head(&response), events) {
                Ok(()) => return pending().await,
                Err(back) => events = back,
            }
        }
        *response.body_mut() = Body::from_stream(events.into_stream());
    }
    Ok(response)
}

/// The head of an answer whose body comes in chunks, and with which the connection ends.
fn head(response: &Response) -> Vec<u8> {
    let date = clock::now().format("%a, %d %b %Y %H:%M:%S GMT");
    let mut head = format!(
        "HTTP/1.1 {}\r\n{DATE}: {date}\r\n{TRANSFER_ENCODING}: chunked\r\n{CONNECTION}: close\r\n",
        response.status()
    )
    .into_bytes();
    for (name, value) in response.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Sends a stream until it is over or nobody reads it any more.
async fn stream(parted: Parted) {
    let Parted {
        socket,
        head,
        mut events,
    } = parted;
    // Otherwise it grows to megabytes, full of what has been overtaken.
    let _ = set_socket_send_buffer_size(&socket, UNREAD_MAX);
    let mut bytes = Bytes::from(head);
    loop {
        if send(&socket, &bytes).await.is_err() {
            return;
        }
        tokio::select! {
            biased;
            piece = events.next() => match piece {
                Some(piece) => bytes = piece.chunk().clone(),
                None => break,
            },
            () = hung_up(&socket) => return,
        }
    }
    let _ = send(&socket, LAST_CHUNK).await;
}

/// Sends all of it.
async fn send(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.try_write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Somebody who reads nothing for so long takes a seat from others.
                let writable = tokio::time::timeout(IDLE, socket.writable());
                writable.await.map_err(|_| io::ErrorKind::TimedOut)??;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Done when the client has gone. What it says meanwhile has no meaning.
async fn hung_up(socket: &TcpStream) {
    let mut waste = [0; 64];
    loop {
        if socket.readable().await.is_err() {
            return;
        }
        match socket.try_read(&mut waste) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
