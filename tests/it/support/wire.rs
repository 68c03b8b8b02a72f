//! A plain connection to Redis, for what no operator should do.

use reqwest::Url;
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::Redis;

pub(crate) struct Wire(BufReader<TcpStream>);

impl Wire {
    pub(crate) async fn connect(redis: &Redis) -> Self {
        Self::to(redis.server.url().expose_secret()).await
    }

    /// Connects to any server.
    pub(crate) async fn to(url: &str) -> Self {
        let url = Url::parse(url).unwrap();
        let stream = TcpStream::connect(("127.0.0.1", url.port().unwrap())).await;
        let mut wire = Self(BufReader::new(stream.unwrap()));
        let (user, password) = (url.username(), url.password().unwrap());
        wire.run(&["AUTH", user, password]).await;
        wire
    }

    /// Runs a command that answers with one line, and gives it.
    pub(crate) async fn run(&mut self, words: &[&str]) -> String {
        self.send(words).await;
        let line = self.line().await;
        assert!(line.starts_with(['+', ':']), "{words:?}: {line}");
        line[1..].to_owned()
    }

    /// Runs a command, and gives all strings and numbers of its answer, however nested.
    pub(crate) async fn ask(&mut self, words: &[&str]) -> Vec<String> {
        self.send(words).await;
        let mut answer = Vec::new();
        let mut open = 1;
        while open > 0 {
            open -= 1;
            let line = self.line().await;
            let (kind, rest) = line.split_at(1);
            match kind {
                "*" => open += rest.parse::<usize>().unwrap_or(0),
                "$" if rest == "-1" => {}
                "$" => {
                    let mut bulk = vec![0; rest.parse::<usize>().unwrap() + 2];
                    self.0.read_exact(&mut bulk).await.unwrap();
                    bulk.truncate(bulk.len() - 2);
                    answer.push(String::from_utf8_lossy(&bulk).into_owned());
                }
                "+" | ":" => answer.push(rest.to_owned()),
                _ => panic!("{words:?}: {line}"),
            }
        }
        answer
    }

    /// Sends a command.
    pub(crate) async fn send(&mut self, words: &[&str]) {
        let bulk = |word: &&str| format!("${}\r\n{word}\r\n", word.len());
        let bulks: String = words.iter().map(bulk).collect();
        let command = format!("*{}\r\n{bulks}", words.len());
        self.0.write_all(command.as_bytes()).await.unwrap();
    }

    /// The next line of an answer.
    pub(crate) async fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        line.trim_end().to_owned()
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
