//! HTTP/1.1 connections to the server, kept alive and driven by the task that owns them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// One connection, for one request at a time. No task of its own moves its bytes: whoever waits
/// for an answer does, which saves a change of tasks for every request.
pub(crate) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: Option<Pin<Box<Driver>>>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody listens at the address, or this machine has no socket left.
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let (sender, driver) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        Ok(Self {
            sender,
            driver: Some(Box::pin(driver)),
        })
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    ///
    /// The connection broke. The server may or may not have acted on the request.
    pub(crate) async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Bytes>> {
        let Self { sender, driver } = self;
        let answer = async {
            sender.ready().await?;
            let (parts, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Response::from_parts(parts, body))
        };
        tokio::pin!(answer);
        if let Some(moving) = driver {
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                _ = moving => *driver = None,
            }
        }
        // The connection is over; what it had received is still to be read.
        answer.await
    }

    /// Sends a request whose answer is read as it comes. The connection serves nothing else.
    ///
    /// # Errors
    ///
    /// The connection broke before the head of an answer came.
    pub(crate) async fn stream(
        mut self,
        request: Request<Full<Bytes>>,
    ) -> hyper::Result<Response<Incoming>> {
        if let Some(driver) = self.driver.take() {
            tokio::spawn(driver);
        }
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }
}

/// One request on a connection of its own.
///
/// # Errors
///
/// No answer came in time.
pub(crate) async fn call(
    address: SocketAddr,
    request: Request<Full<Bytes>>,
    patience: Duration,
) -> Result<Response<Bytes>> {
    timeout(patience, async {
        let mut connection = Connection::open(address).await?;
        anyhow::Ok(connection.exchange(request).await?)
    })
    .await
    .with_context(|| format!("no answer within {} ms", patience.as_millis()))?
}
