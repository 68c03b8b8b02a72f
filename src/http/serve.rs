//! Listens: accepts connections, speaks HTTP on them, and takes those that become event streams
//! away from the HTTP library.
//!
//! A subscriber stays for hours and only ever gets bytes that are the same for everybody. The
//! buffers and the state of a connection that could still carry any request are many times what
//! that needs, so its socket is taken out, and what is left of it is one small task.

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    io::{self, IoSlice},
    net::SocketAddr,
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

use crate::{clock, realtime::Events};

/// What the kernel may hold for a subscriber who does not read, bytes: a few seconds of frames.
/// Whoever is slower than that skips to the last one.
const UNREAD_MAX: usize = 8 * 1024;

/// What ends a body in chunks.
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The pause after a connection could not be accepted: for want of files, most likely, which ends
/// only when somebody leaves.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` until `stop`; done when the last connection is.
///
/// No more than `connections` are served at once. Others wait in the kernel's queue: each costs a
/// file, and the stores need some, too.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    connections: usize,
    stop: CancellationToken,
) {
    let open = TaskTracker::new();
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept(&listener, &router, connections, &open, &stop) => {}
    }
    drop(listener);
    open.close();
    open.wait().await;
}

/// Lets people in for ever.
async fn accept(
    listener: &TcpListener,
    router: &Router,
    connections: usize,
    open: &TaskTracker,
    stop: &CancellationToken,
) {
    let seats = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
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
        // Answers are small: they should not wait for more. A closed socket says so by itself.
        let _ = socket.set_nodelay(true);
        let speaking = speak(socket, peer, router.clone(), stop.clone());
        let streams = open.clone();
        open.spawn(async move {
            if let Some(parted) = speaking.await {
                // In a task of its own: this one is much larger.
                streams.spawn(async move {
                    stream(parted).await;
                    drop(seat);
                });
            }
        });
    }
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
    socket: Option<TcpStream>,
    /// Whether something was written that the library has not followed up with a flush: then it
    /// may have more to write.
    unflushed: bool,
    parted: Option<Parted>,
}

impl Wire {
    fn new(socket: TcpStream) -> Self {
        Self(Arc::new(Mutex::new(Ends {
            socket: Some(socket),
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
            Some(socket) => {
                ends.parted = Some(Parted {
                    socket,
                    head,
                    events,
                });
                Ok(())
            }
            None => Err(events),
        }
    }

    fn parted(&self) -> Option<Parted> {
        self.ends().parted.take()
    }
}

impl Ends {
    fn socket(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let socket = self.socket.as_mut().map(Pin::new);
        socket.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.ends().socket()?.poll_read(context, buffer)
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
        ends.socket()?.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut ends = self.ends();
        ends.unflushed = true;
        ends.socket()?.poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ends = self.ends();
        ready!(ends.socket()?.poll_flush(context))?;
        ends.unflushed = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ends().socket()?.poll_shutdown(context)
    }
}

/// Speaks HTTP on a connection until it is over, or until a stream is all that is left of it.
async fn speak(
    socket: TcpStream,
    peer: SocketAddr,
    router: Router,
    stop: CancellationToken,
) -> Option<Parted> {
    let wire = Wire::new(socket);
    let service = service_fn(|request: HttpRequest<Incoming>| {
        answer(request.map(Body::new), peer, router.clone(), wire.clone())
    });
    let builder = Builder::new(TokioExecutor::new());
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
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.writable().await?,
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
