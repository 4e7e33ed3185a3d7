//! Uploads: a `multipart/form-data` body that is too large to keep in memory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::conf::hex;
use crate::params::Params;

/// The most bytes of a part that is no file, and of the head of a part.
const MAX_FIELD: usize = 4096;

/// A file that came with a request. It is removed unless it is moved away.
#[derive(Debug)]
pub struct Upload {
    path: PathBuf,
    size: u64,
    sha256: String,
}

impl Upload {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its checksum in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Moves it to its place, also to another filesystem.
    pub fn move_to(&self, target: &Path) -> io::Result<()> {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        if fs::rename(&self.path, target).is_err() {
            fs::copy(&self.path, target)?;
            fs::remove_file(&self.path)?;
        }
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Why a body could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// It does not have the form.
    #[error("upload: {0}")]
    Malformed(&'static str),
    /// The file could not be written.
    #[error("upload: {0}")]
    Write(#[from] io::Error),
}

/// The boundary of a `Content-Type: multipart/form-data`.
pub fn boundary(content_type: &str) -> Option<String> {
    let (kind, rest) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let value = rest.split(';').find_map(|p| {
        let (key, value) = p.split_once('=')?;
        key.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
    })?;
    let valid =
        !value.is_empty() && value.len() <= 70 && value.bytes().all(|b| b.is_ascii_graphic());
    valid.then(|| value.to_owned())
}

enum Part {
    Before,
    Field { name: String, value: Vec<u8> },
    File { file: File, size: u64, hash: Sha256 },
    After,
}

/// Takes a body piece by piece.
pub struct Parser {
    dir: PathBuf,
    delimiter: Vec<u8>,
    buffer: Vec<u8>,
    part: Part,
    fields: Params,
    path: Option<PathBuf>,
    upload: Option<Arc<Upload>>,
}

impl Parser {
    /// A parser that puts the file into a directory.
    pub fn new(dir: &Path, boundary: &str) -> Self {
        Self {
            dir: dir.to_owned(),
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            // The first delimiter has no line before it.
            buffer: b"\r\n".to_vec(),
            part: Part::Before,
            fields: Params::default(),
            path: None,
            upload: None,
        }
    }

    /// Takes more bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), UploadError> {
        self.buffer.extend_from_slice(bytes);
        loop {
            if matches!(self.part, Part::After) {
                self.buffer.clear();
                return Ok(());
            }
            match find(&self.buffer, &self.delimiter) {
                Some(at) => {
                    let rest = at + self.delimiter.len();
                    // Two dashes end the body, a line break begins the head of a part.
                    let Some(mark) = self.buffer.get(rest..rest + 2) else { return Ok(()) };
                    if mark == b"--" {
                        self.content(at)?;
                        self.end_part()?;
                        self.part = Part::After;
                        continue;
                    }
                    if mark != b"\r\n" {
                        return Err(UploadError::Malformed("no line break after the boundary"));
                    }
                    let Some(length) = find(&self.buffer[rest..], b"\r\n\r\n") else {
                        if self.buffer.len() - rest > MAX_FIELD {
                            return Err(UploadError::Malformed("the head of a part is too long"));
                        }
                        return Ok(());
                    };
                    self.content(at)?;
                    self.end_part()?;
                    // `content` has taken what was before the delimiter.
                    let head = self.delimiter.len()..self.delimiter.len() + length;
                    let head = String::from_utf8_lossy(&self.buffer[head]).into_owned();
                    self.begin_part(&head)?;
                    self.buffer.drain(..self.delimiter.len() + length + 4);
                }
                None => {
                    // A delimiter may have begun at the end.
                    let safe = self.buffer.len().saturating_sub(self.delimiter.len());
                    return self.content(safe);
                }
            }
        }
    }

    /// The fields and the file, when the whole body has been taken.
    pub fn finish(mut self) -> Result<(Params, Option<Arc<Upload>>), UploadError> {
        if !matches!(self.part, Part::After) {
            return Err(UploadError::Malformed("the body ends before its last boundary"));
        }
        Ok((std::mem::take(&mut self.fields), self.upload.take()))
    }

    /// Takes bytes of the current part from the buffer.
    fn content(&mut self, count: usize) -> Result<(), UploadError> {
        let bytes: Vec<u8> = self.buffer.drain(..count).collect();
        match &mut self.part {
            Part::Before | Part::After => Ok(()),
            Part::Field { value, .. } => {
                value.extend_from_slice(&bytes);
                match value.len() <= MAX_FIELD {
                    true => Ok(()),
                    false => Err(UploadError::Malformed("a field is too long")),
                }
            }
            Part::File { file, size, hash } => {
                file.write_all(&bytes)?;
                hash.update(&bytes);
                *size += bytes.len() as u64;
                Ok(())
            }
        }
    }

    fn end_part(&mut self) -> Result<(), UploadError> {
        match std::mem::replace(&mut self.part, Part::Before) {
            Part::Before | Part::After => {}
            Part::Field { name, value } => {
                let value = String::from_utf8_lossy(&value).into_owned();
                self.fields.0.insert(name, value);
            }
            Part::File { size, hash, .. } => {
                let path = self.path.take().ok_or(UploadError::Malformed("no file"))?;
                let sha256 = hex(&hash.finalize());
                self.upload = Some(Arc::new(Upload { path, size, sha256 }));
            }
        }
        Ok(())
    }

    fn begin_part(&mut self, head: &str) -> Result<(), UploadError> {
        let disposition = head
            .split("\r\n")
            .find(|l| l.to_ascii_lowercase().starts_with("content-disposition:"))
            .ok_or(UploadError::Malformed("a part without a name"))?;
        let attribute = |wanted: &str| {
            disposition.split(';').find_map(|p| {
                let (key, value) = p.split_once('=')?;
                (key.trim() == wanted).then(|| value.trim().trim_matches('"').to_owned())
            })
        };
        let name = attribute("name").ok_or(UploadError::Malformed("a part without a name"))?;
        let Some(file_name) = attribute("filename") else {
            self.part = Part::Field { name, value: Vec::new() };
            return Ok(());
        };
        if self.upload.is_some() {
            return Err(UploadError::Malformed("more than one file"));
        }
        let path = self.dir.join(format!("pveupload-{:016x}", rand::random::<u64>()));
        let file = fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
        self.path = Some(path);
        self.fields.0.insert("filename".into(), file_name);
        self.part = Part::File { file, size: 0, hash: Sha256::new() };
        Ok(())
    }
}

impl Drop for Parser {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BODY: &[u8] =
        b"--B\r\nContent-Disposition: form-data; name=\"content\"\r\n\r\nvztmpl\r\n\
        --B\r\nContent-Disposition: form-data; name=\"filename\"; filename=\"a.tar\"\r\n\
        Content-Type: application/octet-stream\r\n\r\n\0\r\n--Bx\r\n--\xff\r\n--B--\r\n";

    fn parse(
        dir: &Path,
        body: &[u8],
        step: usize,
    ) -> Result<(Params, Option<Arc<Upload>>), String> {
        let mut parser = Parser::new(dir, "B");
        for piece in body.chunks(step) {
            parser.push(piece).map_err(|e| e.to_string())?;
        }
        parser.finish().map_err(|e| e.to_string())
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        // A boundary inside the content is one only if it is a whole line.
        let body: Vec<u8> = String::from_utf8_lossy(BODY).replace("--Bx", "-Bx").into_bytes();
        for step in 1..body.len() {
            let (fields, upload) = parse(dir.path(), &body, step).unwrap();
            assert_eq!(fields.get("content"), Some("vztmpl"));
            assert_eq!(fields.get("filename"), Some("a.tar"));
            let upload = upload.unwrap();
            let content = fs::read(upload.path()).unwrap();
            assert!(content.starts_with(b"\0\r\n-Bx\r\n--"), "{step} {content:?}");
            assert_eq!(upload.size(), content.len() as u64);
            assert_eq!(upload.sha256(), hex(&Sha256::digest(&content)));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "files are left");
    }

    #[test]
    fn what_is_malformed_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!(
            "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n{}",
            "x".repeat(9999)
        );
        let head = format!("--B\r\n{}", "x".repeat(9999));
        let cases: [&[u8]; 7] = [
            b"",
            b"x",
            b"--B\r\n\r\n\r\n--B--",
            BODY,
            &BODY[..BODY.len() - 4],
            long.as_bytes(),
            head.as_bytes(),
        ];
        for body in cases {
            assert!(parse(dir.path(), body, 7).is_err(), "{:?}", String::from_utf8_lossy(body));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "files are left");
    }

    #[test]
    fn the_boundary_is_in_the_content_type() {
        assert_eq!(boundary("multipart/form-data; boundary=abc").as_deref(), Some("abc"));
        assert_eq!(boundary("Multipart/Form-Data; a=b; Boundary=\"a'c\"").as_deref(), Some("a'c"));
        for text in
            ["multipart/form-data", "multipart/form-data; boundary=", "text/plain; boundary=a"]
        {
            assert_eq!(boundary(text), None, "{text}");
        }
    }
}
