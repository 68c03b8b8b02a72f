//! A plain connection to Redis, for what no operator should do.

use reqwest::Url;
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::Redis;

pub(crate) struct Wire(BufReader<TcpStream>);

impl Wire {
    pub(crate) async fn connect(redis: &Redis) -> Self {
        let url = Url::parse(redis.server.url().expose_secret()).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", url.port().unwrap())).await;
        let mut wire = Self(BufReader::new(stream.unwrap()));
        wire.run(&["AUTH", url.password().unwrap()]).await;
        wire
    }

    /// Runs a command that answers with one line, and gives it.
    pub(crate) async fn run(&mut self, words: &[&str]) -> String {
        let bulk = |word: &&str| format!("${}\r\n{word}\r\n", word.len());
        let bulks: String = words.iter().map(bulk).collect();
        let command = format!("*{}\r\n{bulks}", words.len());
        self.0.write_all(command.as_bytes()).await.unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        assert!(line.starts_with(['+', ':']), "{words:?}: {line}");
        line.trim_end()[1..].to_owned()
    }

    /// Writes a journal entry anew, with its fields `f` changed by some Lua.
    pub(crate) async fn forge(&mut self, journal: &str, id: &str, change: &str) {
        let script = format!(
            "local entries = redis.call('XRANGE', KEYS[1], '-', '+')
             redis.call('DEL', KEYS[1])
             local forged = 0
             for _, entry in ipairs(entries) do
               local id, fields, f = entry[1], entry[2], {{}}
               for i = 1, #fields, 2 do f[fields[i]] = fields[i + 1] end
               if id == ARGV[1] then
                 forged = forged + 1
                 {change}
               end
               fields = {{}}
               for name, value in pairs(f) do
                 fields[#fields + 1] = name
                 fields[#fields + 1] = value
               end
               redis.call('XADD', KEYS[1], id, unpack(fields))
             end
             return forged"
        );
        assert_eq!(self.run(&["EVAL", &script, "1", journal, id]).await, "1");
    }
}
