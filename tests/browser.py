"A headless Chromium, spoken to through a pipe in its own DevTools protocol: no driver and no package needed."
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
flags = ('--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync --disable-dev-shm-usage --remote-debugging-pipe --window-size=1300,1600').split()


def find_chromium(): return next(filter(None, map(shutil.which, names)), None)


class Browser:
    "One page in a headless Chromium; `errors` and `requests` fill up as pages are opened"
    def __init__(self, program):
        self.profile = tempfile.mkdtemp()
        to_read,self.to = os.pipe()
        self.back,to_write = os.pipe()
        def pipes(): # Chromium reads commands from 3 and answers on 4
            r,w = os.dup(to_read), os.dup(to_write)
            os.dup2(r, 3); os.dup2(w, 4)
        self.process = subprocess.Popen([program, *flags, f'--user-data-dir={self.profile}', 'about:blank'], preexec_fn=pipes,
                                        close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read); os.close(to_write)
        self.n,self.buffer,self.session,self.errors,self.requests,self.loaded = 0,b'',None,[],[],False
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self.send(f'{domain}.enable')

    def message(self, until):
        "The next message"
        while b'\0' not in self.buffer:
            if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]: raise TimeoutError('Chromium does not answer')
            more = os.read(self.back, 1 << 16)
            if not more: raise RuntimeError('Chromium closed; is another program of that name installed?')
            self.buffer += more
        head,self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(head)

    def note(self, m):
        "Keep what an event says"
        kind,p = m.get('method'), m.get('params', {})
        if kind=='Page.loadEventFired': self.loaded = True
        if kind=='Network.requestWillBeSent': self.requests.append(p['request']['url'])
        if kind=='Runtime.exceptionThrown': self.errors.append(p['exceptionDetails'].get('exception', {}).get('description') or str(p))
        if kind=='Log.entryAdded' and p['entry']['level']=='error': self.errors.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
        if kind=='Runtime.consoleAPICalled' and p['type']=='error': self.errors.append(str(p['args']))

    def send(self, method, timeout=30, **params):
        "Send a command, and wait for its result"
        self.n += 1
        msg = dict(id=self.n, method=method, params=params, **({'sessionId': self.session} if self.session else {}))
        os.write(self.to, json.dumps(msg).encode() + b'\0')
        until = time.monotonic() + timeout
        while True:
            m = self.message(until)
            if m.get('id')!=self.n: self.note(m); continue
            if 'error' in m: raise RuntimeError(f"{method}: {m['error']['message']}")
            return m['result']

    def open(self, url, timeout=30):
        "Open a page, and wait until everything on it has loaded"
        self.loaded = False
        self.send('Page.navigate', url=url)
        until = time.monotonic() + timeout
        while not self.loaded: self.note(self.message(until))
        self.js('new Promise(r => setTimeout(r, 50))')

    def js(self, code):
        "The value of a JavaScript expression, promises awaited"
        r = self.send('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in r: raise RuntimeError(f"{code}: {r['exceptionDetails']}")
        return r['result'].get('value')

    def wait_for(self, code, timeout=10):
        "Wait until a JavaScript expression is true, and return its value"
        until = time.monotonic() + timeout
        while not (value := self.js(code)):
            if time.monotonic() > until: raise TimeoutError(f'never true: {code}')
            time.sleep(0.05)
        return value

    def close(self):
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        os.close(self.to); os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)
