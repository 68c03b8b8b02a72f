//! A subscriber of a sale's live stock that keeps every frame it was sent.

use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{ACCEPT, HOST, HeaderValue};
use hyper::{Request, Uri};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::client::Connection;
use crate::target::Target;

/// Pause before a lost stream is attached again. The server suggests a longer one to crowds; this
/// is one witness.
const REATTACH: Duration = Duration::from_millis(200);

/// The server's heartbeat comes every 15 s; a stream silent for longer is dead.
const SILENCE_MAX: Duration = Duration::from_secs(40);

/// The longest event that is believed, in bytes.
const EVENT_MAX: usize = 64 * 1024;

/// The stock as a frame shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Stock {
    pub(crate) allocation: u64,
    pub(crate) remaining: u64,
    pub(crate) held: u64,
    pub(crate) sold: u64,
}

impl Stock {
    /// Whether every unit is in exactly one of its three places.
    pub(crate) fn adds_up(&self) -> bool {
        let places = [self.remaining, self.held, self.sold].map(u128::from);
        places.iter().sum::<u128>() == u128::from(self.allocation)
    }
}

/// One frame of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// `snapshot`, `stock` or `state`.
    pub(crate) event: String,
    pub(crate) id: String,
    /// What its data says, or why that cannot be read.
    pub(crate) stock: Result<Stock, String>,
}

#[derive(Debug, Default, PartialEq)]
struct Event {
    name: String,
    id: Option<String>,
    data: String,
}

/// Reads `text/event-stream`, whatever the pieces it comes in.
#[derive(Default)]
struct Parser {
    line: Vec<u8>,
    event: Event,
}

impl Parser {
    fn push(&mut self, piece: &[u8]) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > EVENT_MAX {
                bail!("a line longer than {EVENT_MAX} bytes");
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                let line = String::from_utf8(line)?;
                if let Some(event) = self.line(line.trim_end_matches(['\r', '\n'])) {
                    events.push(event);
                }
            }
        }
        Ok(events)
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return (!event.data.is_empty()).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "id" => self.event.id = Some(value.to_owned()),
            "data" => self.event.data.push_str(value),
            // Comments (heartbeats) and `retry`, which is for browsers.
            _ => {}
        }
        None
    }
}

/// A subscriber that stays attached, also across restarts of the server, until it is dropped.
pub(crate) struct Subscriber {
    frames: watch::Receiver<Vec<Frame>>,
    task: AbortHandle,
}

impl Subscriber {
    /// Attaches to a stream.
    pub(crate) fn attach(target: Target, path: Uri) -> Self {
        let (seen, frames) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            loop {
                // Why a stream ended is no finding: what it showed is judged, and the next one
                // begins with a snapshot.
                let _ = follow(&target, &path, &seen).await;
                sleep(REATTACH).await;
            }
        });
        Self {
            frames,
            task: task.abort_handle(),
        }
    }

    /// Waits until the last frame is as wanted; false when time is up first.
    pub(crate) async fn wait_for(
        &mut self,
        patience: Duration,
        mut wanted: impl FnMut(&Frame) -> bool,
    ) -> bool {
        let seen = self
            .frames
            .wait_for(|frames| frames.last().is_some_and(&mut wanted));
        timeout(patience, seen).await.is_ok_and(|seen| seen.is_ok())
    }

    /// Every frame so far, in the order in which they came.
    pub(crate) fn frames(&self) -> Vec<Frame> {
        self.frames.borrow().clone()
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(target: &Target, path: &Uri, seen: &watch::Sender<Vec<Frame>>) -> Result<()> {
    let mut request = Request::get(path.clone())
        .header(HOST, &target.authority)
        .header(ACCEPT, HeaderValue::from_static("text/event-stream"));
    if let Some(last) = seen.borrow().last() {
        request = request.header("last-event-id", &last.id);
    }
    let request = request.body(Full::new(Bytes::new()))?;
    let answer = Connection::open(target.address)
        .await?
        .stream(request)
        .await?;
    if !answer.status().is_success() {
        bail!("status {}", answer.status());
    }
    let (mut body, mut parser) = (answer.into_body(), Parser::default());
    while let Some(piece) = timeout(SILENCE_MAX, body.frame()).await? {
        let Ok(piece) = piece?.into_data() else {
            continue;
        };
        for event in parser.push(&piece)? {
            let frame = Frame {
                stock: serde_json::from_str(&event.data).map_err(|error| error.to_string()),
                id: event.id.unwrap_or_default(),
                event: event.name,
            };
            seen.send_modify(|frames| frames.push(frame));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "retry: 3000\n: hello\n\nevent: snapshot\nid: 1-0\ndata: {\"allocation\":2,\"remaining\":2,\"held\":0,\"sold\":0}\n\nevent:stock\r\nid:1-1\r\ndata:{\"allocation\":2,\r\ndata:\"remaining\":1}\r\n\r\n: beat\n\nevent: stock\ndata: unfini";

    #[test]
    fn a_stream_is_read_the_same_in_any_pieces() {
        let whole = Parser::default().push(STREAM.as_bytes()).unwrap();
        assert_eq!(whole.len(), 2);
        assert_eq!(
            (whole[0].name.as_str(), whole[0].id.as_deref()),
            ("snapshot", Some("1-0"))
        );
        assert_eq!(whole[1].data, "{\"allocation\":2,\"remaining\":1}");
        for size in 1..9 {
            let mut parser = Parser::default();
            let pieces = STREAM.as_bytes().chunks(size);
            let events: Vec<Event> = pieces
                .flat_map(|piece| parser.push(piece).unwrap())
                .collect();
            assert_eq!(events, whole, "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        assert!(Parser::default().push(&vec![b'x'; EVENT_MAX + 1]).is_err());
    }
}
