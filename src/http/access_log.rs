//! The access log: one line per request, written by a task that no request waits for.

use std::{fmt::Write, io, net::IpAddr, time::Duration};

use axum::http::{HeaderValue, Method, StatusCode, Version};
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::json;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};

use crate::metrics::HttpMetrics;

/// Lines that may wait to be written; more are dropped and counted.
const QUEUE_MAX: usize = 8192;

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The combined format of Apache and nginx.
    Combined,
    /// One JSON object.
    Json,
}

/// Where lines go in, if the log is on.
#[derive(Clone)]
pub struct AccessLog(Option<(mpsc::Sender<Line>, HttpMetrics)>);

/// Where they come out.
pub struct AccessLogWriter {
    lines: mpsc::Receiver<Line>,
    format: Format,
}

/// A request and its answer.
pub(super) struct Line {
    pub(super) at: DateTime<Utc>,
    pub(super) client: Option<IpAddr>,
    pub(super) method: Method,
    pub(super) target: String,
    pub(super) version: Version,
    pub(super) status: StatusCode,
    pub(super) bytes: Option<u64>,
    pub(super) elapsed: Duration,
    pub(super) request_id: HeaderValue,
    pub(super) referer: Option<String>,
    pub(super) user_agent: Option<String>,
}

impl AccessLog {
    /// A log that keeps nothing.
    pub fn off() -> Self {
        Self(None)
    }

    /// A log, and the writer that has to [run](AccessLogWriter::run) for it.
    pub fn new(format: Format, metrics: HttpMetrics) -> (Self, AccessLogWriter) {
        let (sender, lines) = mpsc::channel(QUEUE_MAX);
        (
            Self(Some((sender, metrics))),
            AccessLogWriter { lines, format },
        )
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn write(&self, line: Line) {
        if let Some((sender, metrics)) = &self.0
            && sender.try_send(line).is_err()
        {
            metrics.access_log_dropped.inc();
        }
    }
}

impl AccessLogWriter {
    /// Writes lines to `sink` until the last [`AccessLog`] is gone and everything is written.
    ///
    /// # Errors
    /// The sink's; from then on lines are dropped and counted.
    pub async fn run(mut self, mut sink: impl AsyncWrite + Unpin) -> io::Result<()> {
        let mut waiting = Vec::with_capacity(256);
        let mut text = String::new();
        while self.lines.recv_many(&mut waiting, 256).await > 0 {
            text.clear();
            for line in waiting.drain(..) {
                match self.format {
                    Format::Combined => combined(&mut text, &line),
                    Format::Json => json_line(&mut text, &line),
                }
            }
            sink.write_all(text.as_bytes()).await?;
            sink.flush().await?;
        }
        Ok(())
    }
}

fn combined(out: &mut String, line: &Line) {
    let client = line
        .client
        .map_or_else(|| "-".to_owned(), |client| client.to_string());
    let bytes = line
        .bytes
        .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
    // Writing into a string cannot fail.
    let _ = writeln!(
        out,
        "{client} - - [{at}] \"{method} {target} {version:?}\" {status} {bytes} \"{referer}\" \"{agent}\"",
        at = line.at.format("%d/%b/%Y:%H:%M:%S %z"),
        method = line.method,
        target = escaped(&line.target),
        version = line.version,
        status = line.status.as_u16(),
        referer = escaped(line.referer.as_deref().unwrap_or("-")),
        agent = escaped(line.user_agent.as_deref().unwrap_or("-")),
    );
}

/// What a client sent, so that it can neither end the line nor its quotes.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\\' => safe.extend(['\\', character]),
            character if character.is_control() => safe.extend(character.escape_unicode()),
            character => safe.push(character),
        }
    }
    safe
}

fn json_line(out: &mut String, line: &Line) {
    let object = json!({
        "at": line.at.to_rfc3339_opts(SecondsFormat::Millis, true),
        "client": line.client,
        "method": line.method.as_str(),
        "target": line.target,
        "version": format!("{:?}", line.version),
        "status": line.status.as_u16(),
        "bytes": line.bytes,
        "elapsed_us": u64::try_from(line.elapsed.as_micros()).unwrap_or(u64::MAX),
        "request_id": line.request_id.to_str().unwrap_or_default(),
        "referer": line.referer,
        "user_agent": line.user_agent,
    });
    // Writing into a string cannot fail.
    let _ = writeln!(out, "{object}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn line() -> Line {
        Line {
            at: DateTime::from_timestamp_millis(1_764_000_000_120).unwrap(),
            client: Some([192, 0, 2, 1].into()),
            method: Method::GET,
            target: "/v1/products?q=a\"b".into(),
            version: Version::HTTP_11,
            status: StatusCode::OK,
            bytes: Some(17),
            elapsed: Duration::from_micros(1500),
            request_id: HeaderValue::from_static("r-1"),
            referer: None,
            user_agent: Some("curl\n\\8".into()),
        }
    }

    async fn written(format: Format) -> String {
        let (log, writer) = AccessLog::new(format, Metrics::new().http);
        log.write(line());
        drop(log);
        let mut sink = Vec::new();
        writer.run(&mut sink).await.unwrap();
        String::from_utf8(sink).unwrap()
    }

    #[tokio::test]
    async fn a_line_is_one_line_in_either_format() {
        assert_eq!(
            written(Format::Combined).await,
            "192.0.2.1 - - [24/Nov/2025:16:00:00 +0000] \"GET /v1/products?q=a\\\"b HTTP/1.1\" 200 17 \"-\" \"curl\\u{a}\\\\8\"\n"
        );
        let json = written(Format::Json).await;
        assert_eq!(json.lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["at"], "2025-11-24T16:00:00.120Z");
        assert_eq!(
            (&json["status"], &json["elapsed_us"], &json["request_id"]),
            (&200.into(), &1500.into(), &"r-1".into())
        );
        assert_eq!(json["user_agent"], "curl\n\\8");
    }

    #[tokio::test]
    async fn a_writer_that_is_behind_costs_lines_not_time() {
        let metrics = Metrics::new().http;
        let (log, writer) = AccessLog::new(Format::Json, metrics.clone());
        for _ in 0..=QUEUE_MAX {
            log.write(line());
        }
        assert_eq!(metrics.access_log_dropped.get(), 1);
        drop(log);
        let mut sink = Vec::new();
        writer.run(&mut sink).await.unwrap();
        assert_eq!(String::from_utf8(sink).unwrap().lines().count(), QUEUE_MAX);
    }
}
